"""Step 6: decode with a plan through the sparse runtime."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from was_search.errors import ConfigError
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.steps.evaluation import load_for

if TYPE_CHECKING:
    from torch import Tensor

    from was_kernels import DecodingLoop, Sampling, SparseModel
    from was_search.shape import IntArray, ModelShape

_COUNTED_TOKENS = 32


@dataclass(frozen=True)
class Generation:
    """Text decoded from a prompt.

    Attributes:
        text: what is new, without special tokens and without the string that ended it.
        tokens: new ones, with those that ended the text.
        seconds: to the last token.
        achieved: sparsity of the first one-token steps, counted; None: dense.
        finish: ``stop`` where an end-of-text token or a stop string ended it, ``length`` where ``max_new_tokens`` did.
        first_seconds: to the first token.
        prompt: as it was given.
        eager_because: why the steps did not run from a CUDA graph; None if they did.
    """

    text: str
    tokens: int
    seconds: float
    achieved: float | None
    finish: Literal["stop", "length"]
    first_seconds: float
    prompt: str
    eager_because: str | None

    @property
    def tokens_per_second(self) -> float | None:
        """The rate after the first token; None where there is no other."""
        return (self.tokens - 1) / (self.seconds - self.first_seconds) if self.tokens > 1 else None


@dataclass(frozen=True)
class _Prompt:
    """A prompt in tokens, and how many control tokens its text names."""

    text: str
    ids: IntArray
    controls: int


def generate(
    context: Context,
    plan: Plan | None,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    gpus: int = 1,
) -> Generation:
    """Decode what follows ``prompt``, sparse with a plan, dense without; the text is shown while it comes.

    Args:
        context: its settings give model, device and dtype.
        plan: for this model; None: dense.
        prompt: text to continue.
        max_new_tokens: at least 1.
        sampling: how tokens are chosen; None: the likeliest each time. Nothing of the checkpoint's own wishes counts
            but the ids that end and pad a text.
        stop: strings that end the text, and are left out of it.
        chat: ``prompt`` is a message of a chat, written by the tokenizer's chat template; the text is the answer.
        gpus: GPUs that the model is spread over.

    Raises:
        ConfigError: a prompt that is empty or no text, or no room for it in the model's positions; a stop string that
            is empty; or a chat without a template.
        PlanError: the plan belongs to another model.
        ResourceError: fewer than ``gpus`` GPUs, or they are too small.
    """
    (found,) = generate_each(
        context, plan, [prompt], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat, gpus=gpus
    )
    return found


def generate_each(
    context: Context,
    plan: Plan | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    gpus: int = 1,
) -> list[Generation]:
    """Decode what follows each of ``prompts``, one after another; arguments and errors as of :func:`generate`."""
    from was_kernels import DecodingLoop, Sampling, sparsify
    from was_search.checkpoints.load import load_tokenizer
    from was_search.texts.incremental import require_stops
    from was_search.texts.tokens import require_rows

    if not prompts:
        raise ConfigError("prompts: must hold at least one, got none")
    given = {_name(i, len(prompts)): text for i, text in enumerate(prompts)}
    for name, text in given.items():
        _require_text(name, text)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    stops = require_stops(stop)
    sampling = sampling or Sampling()
    tokenizer = load_tokenizer(context.model.source)
    asked = {name: _read(text, tokenizer, chat) for name, text in given.items()}
    for name, prompt in asked.items():
        require_rows(prompt.ids, context.model.token_rows, tokenizer, f"the {name}")
        _require_room(name, len(prompt.ids), max_new_tokens, context.model.positions)
    model, structure = load_for(context, plan, gpus)
    _say_what_does_nothing(context, sampling)
    handle = None if plan is None else sparsify(model, plan)
    applied: AbstractContextManager[Any] = nullcontext() if handle is None else handle
    with applied:
        loop = DecodingLoop(model) if handle is None else handle.loop
        ends = loop.eos | (ends_of_answers(tokenizer) if chat else frozenset())
        options = {"max_new_tokens": max_new_tokens, "sampling": sampling}
        decoder = _Decoder(context, loop, handle, structure.shape, tokenizer, options, ends, stops, chat)
        return [decoder.decode(prompt, f"[{name}]" if len(asked) > 1 else "") for name, prompt in asked.items()]


@dataclass(frozen=True)
class _Decoder:
    """A model that is ready for one prompt after another, with or without a plan (``handle``)."""

    context: Context
    loop: DecodingLoop
    handle: SparseModel | None
    shape: ModelShape
    tokenizer: Any
    options: dict[str, Any]
    ends: frozenset[int]
    stops: tuple[str, ...]
    chat: bool

    def decode(self, prompt: _Prompt, title: str) -> Generation:
        """Show the text while it comes, then its figures."""
        from was_kernels import TextStream

        self.loop.prepare(_tensor(prompt.ids), **self.options)
        ends: dict[str, Any] = {"eos": self.ends, "stops": self.stops}
        stream = TextStream(self.loop, self.tokenizer, prompt.ids.tolist(), **ends, **self.options)
        parts = []
        with self.context.reporter.writing(title) as write:
            if not self.chat:
                write(prompt.text)
            for part in stream:
                parts.append(part)
                write(part)
        assert stream.finish is not None and stream.first_seconds is not None
        found = Generation(
            text="".join(parts),
            tokens=stream.tokens,
            seconds=stream.seconds,
            achieved=self._achieved(prompt.ids),
            finish=stream.finish,
            first_seconds=stream.first_seconds,
            prompt=prompt.text,
            eager_because=self.loop.eager_because,
        )
        self._show(found, prompt.controls)
        return found

    def _achieved(self, ids: IntArray) -> float | None:
        """Counted in a run of its own, since counting would slow the timed one."""
        if self.handle is None:
            return None
        few = {**self.options, "max_new_tokens": min(self.options["max_new_tokens"], _COUNTED_TOKENS)}
        with self.handle.counting() as counts:
            for _ in self.handle.stream(_tensor(ids), eos=self.ends, **few):
                pass
        return self.shape.sparsity(counts.achieved())

    def _show(self, found: Generation, controls: int) -> None:
        reporter, device = self.context.reporter, self.context.placement_here.device
        for note in _notes(found, controls, device):
            reporter.note(note)
        reporter.result({**asdict(found), "tokens_per_second": found.tokens_per_second, "device": device})


def _notes(found: Generation, controls: int, device: str) -> Iterator[str]:
    """What is said after a text."""
    if controls > 0:
        yield f"{controls} control token(s) are named in the prompt"
    yield f"{_figures(found)}, {device}"
    if found.eager_because is not None and device.startswith("cuda"):
        yield f"steps ran without a CUDA graph: {found.eager_because}"


def _figures(found: Generation) -> str:
    """Tokens, times and sparsity in words."""
    words = f"{found.tokens} token{'s' if found.tokens > 1 else ''} in {found.seconds:.2f} s"
    if found.tokens_per_second is not None:
        words += f", the first after {found.first_seconds:.2f} s, then {found.tokens_per_second:.1f} tokens/s"
    if found.achieved is None:
        return f"{words}, dense"
    return f"{words}, {100 * found.achieved:.1f} % of weights skipped in decode steps"


def _name(i: int, n: int) -> str:
    return "prompt" if n == 1 else f"prompt {i + 1} of {n}"


def _require_text(name: str, prompt: str) -> None:
    if not prompt:
        raise ConfigError(f"{name}: must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes that could not be read as text
        raise ConfigError(f"{name}: holds bytes that are no {sys.getfilesystemencoding()}, which this terminal says")


def _read(text: str, tokenizer: Any, chat: bool) -> _Prompt:
    from was_search.texts.chat import chat_ids
    from was_search.texts.tokens import beginning, count_controls, prompt_ids

    ids = prompt_ids(text, tokenizer)
    own = count_controls(np.asarray(beginning(tokenizer), np.int64), tokenizer)
    return _Prompt(text, chat_ids(text, tokenizer) if chat else ids, count_controls(ids, tokenizer) - own)


def _require_room(name: str, there: int, new: int, room: int | None) -> None:
    if room is not None and there + new > room:
        raise ConfigError(
            f"{name}: {there} tokens and {new} new ones exceed the model's {room} positions; "
            "shorten it, or give a smaller --max-new-tokens"
        )


def _say_what_does_nothing(context: Context, sampling: Sampling) -> None:
    given = [name for name in ("top_k", "top_p", "seed") if getattr(sampling, name) != getattr(type(sampling), name)]
    if given and sampling.temperature == 0.0:
        context.reporter.note(f"{', '.join(given)}: nothing is drawn at temperature 0; give --temperature to sample")


def ends_of_answers(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's own end: checkpoints tuned for chats do not all name it in ``generation_config.json``."""
    end = tokenizer.eos_token_id
    return frozenset() if end is None else frozenset((end,))


def _tensor(ids: IntArray) -> Tensor:
    import torch

    return torch.from_numpy(ids)[None]
