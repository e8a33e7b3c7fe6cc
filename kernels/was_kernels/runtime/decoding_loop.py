"""A decoding loop of our own: whole steps, from a token to the next, in one CUDA graph, and tokens as they come.

``generate`` makes a step's inputs, chooses the token and looks for the end on the host, and the GPU waits. Here the
next token is chosen on the device inside the graph, which is launched again before the host has read the last token.
On CPUs, and where a graph would get something wrong, the same steps run without one.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, StaticCache

from was_kernels.runtime.capture import CaptureError, addresses, captured
from was_kernels.runtime.fused_forward import is_hooked
from was_kernels.runtime.positions import CACHES
from was_kernels.runtime.sampling import Form, Sampler, Sampling
from was_search.errors import ConfigError

_ROOM = 256
"""The cache is made for a multiple of so many positions, so that the next text may find it long enough."""

_UNTIL_CAPTURED = 3
"""Tokens after which the step is captured: the first is the prompt's, the second's step runs without a graph."""

GREEDY = Sampling()


class DecodingLoop:
    """Decodes one text or a few at once from a causal language model, dense or running a plan.

    The cache and the graph of the last text are kept for the next one of its kind: rows, form of sampling, length.
    Not thread-safe, like the model; several streams may be read in turns.

    Args:
        model: a transformers causal language model. While a stream is read, leave its weights and hooks alone.
        compiled: on a GPU, make steps through ``torch.compile``; the first takes half a minute or more.
        graphs: replay steps from CUDA graphs where that is right.

    Attributes:
        eager_because: why the last stream's steps ran without a graph; None if they did not.
    """

    def __init__(self, model: Any, *, compiled: bool = False, graphs: bool = True) -> None:
        self.eager_because: str | None = None
        self._model = model
        self._compiled = compiled
        self._graphs = graphs
        self._forward: Any = None
        self._kept: _Texts | None = None

    @property
    def eos(self) -> frozenset[int]:
        """Ids that end a row where no others are given: those of the model's ``generation_config``."""
        return frozenset(_stored_ends(self._model))

    def stream(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        eos: Collection[int] | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[list[int | None]]:
        """The new tokens step by step: one for each row, None for rows that have ended; stops when all have.

        The token that ends a row is given too, as ``generate`` does.

        Args:
            ids: int64 [rows, n], the prompts; shorter ones padded on the left.
            max_new_tokens: of each row, at least 1.
            sampling: how tokens are chosen.
            eos: ids that end a row; None: those of the model's ``generation_config``; empty: none.
            mask: [rows, n], zero where a prompt is padded; None: nowhere.

        Raises:
            ConfigError: ids or mask are of another shape, a prompt is empty or padded on the right, or
                ``max_new_tokens`` is under 1.
        """
        ids, mask = _checked(ids, mask, max_new_tokens, self._model.get_input_embeddings().weight.device)
        ends = self.eos if eos is None else frozenset(eos)
        return self._stream(ids, mask, max_new_tokens, sampling, ends)

    def prepare(self, ids: Tensor, *, max_new_tokens: int, sampling: Sampling = GREEDY) -> None:
        """Do beforehand what only the first stream of its kind has to: compile kernels, and capture the step.

        Arguments and errors are those of :meth:`stream`. On a CPU there is nothing to do.
        """
        steps: Any = self.stream(ids, max_new_tokens=max_new_tokens, sampling=sampling, eos=())
        if self._model.get_input_embeddings().weight.device.type == "cuda":
            for _ in zip(range(_UNTIL_CAPTURED), steps, strict=False):
                pass
        steps.close()

    def drop(self) -> None:
        """Forget the kept cache and graph."""
        self._kept = None

    def _stream(
        self, ids: Tensor, mask: Tensor | None, most: int, sampling: Sampling, ends: frozenset[int]
    ) -> Iterator[list[int | None]]:
        texts, self._kept = self._texts(ids, mask is not None, most, sampling.form), None
        going = [True] * len(ids)
        try:
            texts.begin(ids, mask, sampling)
            for step in range(most):
                # Ahead of the host by one step, except that nothing holds up the first token.
                if step and texts.asynchronous and step + 1 < most:
                    texts.advance(step + 1)
                self.eager_because = texts.eager_because
                tokens = texts.received(step)
                yield [token if there else None for token, there in zip(tokens, going, strict=True)]
                going = [there and token not in ends for token, there in zip(tokens, going, strict=True)]
                if not any(going):
                    break
                if step + 1 < most and not (step and texts.asynchronous):
                    texts.advance(step + 1)
        finally:
            self._kept = texts

    def _texts(self, ids: Tensor, padded: bool, most: int, form: Form) -> _Texts:
        rows, positions = ids.shape[0], ids.shape[1] + most
        refusal = why_no_graph(self._model, ids.device, padded) if self._graphs else "graphs are off"
        kept = self._kept
        if kept is not None and kept.serves(form, rows, positions, refusal):
            return kept
        forward = self._model
        if self._compiled and refusal is None:
            forward = self._forward = self._forward or torch.compile(self._model.forward, fullgraph=True)
        return _Texts(
            self._model, forward, Sampler(form, rows, _vocabulary(self._model), ids.device), positions, refusal
        )


class _Texts:
    """A few texts on the device: their cache, their last tokens, and the step that makes the next.

    Args:
        model: reads the prompts.
        forward: makes the steps that may be captured; the model, or a compiled form of its forward.
        sampler: chooses tokens, for so many rows as there are texts.
        positions: of prompt and new tokens together.
        refusal: why no step may be captured; None: they may.
    """

    def __init__(self, model: Any, forward: Any, sampler: Sampler, positions: int, refusal: str | None) -> None:
        rows, device = sampler.rows, sampler.device
        self.asynchronous = device.type == "cuda"
        self.eager_because = refusal
        self._static = refusal is None  # a cache of one length, which a graph needs
        self._model = model
        self._forward = forward
        self._sampler = sampler
        self._longest = -(-positions // _ROOM) * _ROOM
        self._names = frozenset(inspect.signature(model.forward).parameters)
        self._cache: Any = None
        self._graph: Any = None
        self._warm = False
        self._weights: tuple[int, ...] = ()
        self._tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._mask: Tensor | None = None
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._out = torch.zeros((2, rows), dtype=torch.int64, pin_memory=self.asynchronous)
        event: Any = torch.cuda.Event
        self._events = [event() for _ in range(2)] if self.asynchronous else []

    def serves(self, form: Form, rows: int, positions: int, refusal: str | None) -> bool:
        """Whether these can be used again for ``rows`` texts of ``positions`` positions."""
        fits = positions <= self._longest <= 2 * max(positions, _ROOM)
        static = refusal is None
        return fits and (form, rows, static) == (self._sampler.form, self._sampler.rows, self._static)

    @torch.inference_mode()
    def begin(self, ids: Tensor, mask: Tensor | None, sampling: Sampling) -> None:
        """Read the prompts and choose each row's first token, number 0."""
        if self._cache is not None and self._static:
            self._cache.reset()
        else:
            self._cache = new_cache(self._model, self._longest if self._static else None)
        if self._static:
            self._look_at_weights()
        if (mask is None) != (self._mask is None):
            self._forget()
        given: dict[str, Any] = {"input_ids": ids, **self._with_cache()}
        if "logits_to_keep" in self._names:
            given["logits_to_keep"] = 1
        if mask is not None:
            given |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        self._keep_mask(mask)
        self._at.fill_(ids.shape[1])
        self._positions.copy_(self._at[None] if mask is None else mask.sum(-1, keepdim=True))
        logits = self._model(**given).logits
        self._sampler.begin(sampling, ids, mask)
        self._tokens.copy_(self._sampler.choose(logits[:, -1])[:, None])
        self._send(0)

    @torch.inference_mode()
    def advance(self, step: int) -> None:
        """Make token number ``step``; on a GPU it may not be there yet when this returns."""
        if self._graph is None and self.eager_because is None and self._warm:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()  # the first of its kind too: kernels are compiled and cuBLAS makes its workspace
            self._warm = True
        self._send(step)

    def received(self, step: int) -> list[int]:
        """Token number ``step`` of each row, of which the last two are at hand."""
        if self._events:
            self._events[step % 2].synchronize()
        row: list[int] = self._out[step % 2].tolist()
        return row

    def _send(self, step: int) -> None:
        self._out[step % 2].copy_(self._tokens[:, 0], non_blocking=True)
        if self._events:
            self._events[step % 2].record()

    def _step(self) -> None:
        given = {"input_ids": self._tokens, "position_ids": self._positions, **self._with_cache()}
        if self._mask is not None:
            given["attention_mask"] = self._longer_mask(self._mask)
        logits = self._forward(**given).logits
        self._tokens.copy_(self._sampler.choose(logits[:, -1])[:, None])
        self._positions.add_(1)
        self._at.add_(1)

    def _capture(self) -> None:
        """Capture the step, which is not run by that; where it cannot be, steps go on without a graph."""
        try:
            self._graph, _ = captured(self._step, self._tokens.device, generator=self._sampler.generator)
        except CaptureError as error:
            self.eager_because = str(error)

    def _with_cache(self) -> dict[str, Any]:
        return {next(name for name in CACHES if name in self._names): self._cache, "use_cache": True}

    def _keep_mask(self, mask: Tensor | None) -> None:
        """Of positions, for a cache of one length, in the tensor that a graph reads; else of tokens."""
        if mask is None or not self._static:
            self._mask = mask
            return
        if self._mask is None:
            self._mask = mask.new_zeros((mask.shape[0], 1, 1, self._longest), dtype=torch.bool)
        self._mask.zero_()
        self._mask[:, 0, 0, : mask.shape[1]] = mask != 0

    def _longer_mask(self, mask: Tensor) -> Tensor:
        """With the new token's position."""
        if self._static:
            return mask.index_fill_(3, self._at, True)
        self._mask = torch.cat((mask, mask.new_ones((mask.shape[0], 1))), dim=1)
        return self._mask

    def _look_at_weights(self) -> None:
        """A graph reads the weights where they lay when it was captured."""
        weights = addresses(self._model)
        if weights != self._weights:
            self._weights = weights
            self._forget()

    def _forget(self) -> None:
        self._graph, self._warm = None, False


def why_no_graph(model: Any, device: torch.device, padded: bool) -> str | None:
    """Why steps of ``model`` may not be captured, as far as can be known without trying; None: they may."""
    if device.type != "cuda":
        return "not on a GPU"
    if {tensor.device for tensor in (*model.parameters(), *model.buffers())} != {device}:
        return "the model is spread over devices"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if _has_any_global_hook() or is_hooked(model.modules()):  # type: ignore[no-untyped-call]
        return "a module has hooks, or a forward of its own"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers takes its steps for none that can be captured"
    if any(type(layer).__name__ != "StaticLayer" for layer in new_cache(model, _ROOM).layers):
        return "its cache is not of one length"
    if padded and getattr(model.config, "_attn_implementation", None) != "sdpa":
        return "its attention takes no mask of positions"
    return None


def new_cache(model: Any, longest: int | None) -> Any:
    """A cache of transformers for ``longest`` positions, or one that grows."""
    config = model.config.get_text_config(decoder=True)
    return DynamicCache(config=config) if longest is None else StaticCache(config=config, max_cache_len=longest)


def _checked(ids: Tensor, mask: Tensor | None, most: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or 0 in ids.shape or ids.is_floating_point():
        raise ConfigError(f"ids: must be whole numbers [rows, n] with a token at least, got {_words(ids)}")
    if most < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1, got {most}")
    ids = ids.to(device, torch.int64)
    if mask is None:
        return ids, None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ConfigError(f"mask: must be shaped like ids, {list(ids.shape)}, got {_words(mask)}")
    mask = (mask != 0).to(device, torch.int64)
    if not bool((mask.diff(dim=1) >= 0).all() and mask[:, -1].all()):
        raise ConfigError("mask: prompts must be padded on the left only, and hold a token")
    return ids, None if bool(mask.all()) else mask


def _words(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _stored_ends(model: Any) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return (
        [] if ends is None else ends.tolist() if isinstance(ends, Tensor) else [ends] if isinstance(ends, int) else ends
    )


def _vocabulary(model: Any) -> int:
    head = model.get_output_embeddings()
    return int(model.config.get_text_config(decoder=True).vocab_size if head is None else head.out_features)
