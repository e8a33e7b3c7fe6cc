"""Step 6: decode with a plan through the sparse runtime."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from was_search.errors import ConfigError
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.steps.evaluation import load_for

_COUNTED_TOKENS = 32


@dataclass(frozen=True)
class Generation:
    """Text decoded from a prompt; ``achieved`` is the sparsity of its first one-token steps, counted (None: dense)."""

    text: str
    tokens: int
    seconds: float
    achieved: float | None


def generate(
    context: Context, plan: Plan | None, prompt: str, *, max_new_tokens: int = 64, gpus: int = 1
) -> Generation:
    """Greedy decoding of ``prompt``, sparse with a plan, dense without, on one GPU or spread over ``gpus``.

    Raises:
        ConfigError: a prompt that is empty or no text, or no room for it in the model's positions.
        PlanError: the plan belongs to another model.
        ResourceError: fewer than ``gpus`` GPUs, or they are too small.
    """
    import torch

    from was_kernels import sparsify
    from was_search.checkpoints.load import load_tokenizer
    from was_search.checkpoints.structure import token_rows
    from was_search.texts.tokens import beginning, count_controls, prompt_ids, require_rows

    if not prompt:
        raise ConfigError("prompt: must not be empty")
    if not _is_text(prompt):
        raise ConfigError(f"prompt: holds bytes that are no {sys.getfilesystemencoding()}, which this terminal says")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    tokenizer = load_tokenizer(context.model.source)
    model, structure = load_for(context, plan, gpus)
    ids = prompt_ids(prompt, tokenizer)
    require_rows(ids, token_rows(model), tokenizer, "the prompt")
    fed = torch.from_numpy(ids)[None].to(context.placement_here.device)
    there = len(ids)
    room = context.model.positions
    if room is not None and there + max_new_tokens > room:
        raise ConfigError(f"prompt: {there} tokens and {max_new_tokens} new ones exceed the model's {room} positions")

    def run(new_tokens: int) -> tuple[str, int, float]:
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                input_ids=fed,
                attention_mask=torch.ones_like(fed),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                **cache,
            )
        new = output[0, there:]
        return str(tokenizer.decode(new, skip_special_tokens=True)), len(new), time.perf_counter() - started

    # Fused steps need a cache that does not grow; compiling would take longer than most texts. Over several GPUs
    # nothing is fused: positions and lengths of the cache would be needed on each.
    static = context.placement_here.device.startswith("cuda") and gpus == 1
    cache: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}
    if plan is None:
        result = Generation(*run(max_new_tokens), achieved=None)
    else:
        handle = sparsify(model, plan)
        try:
            text, tokens, seconds = run(max_new_tokens)
            with handle.counting() as counts:  # a run of its own: counting would slow the timed one
                run(min(max_new_tokens, _COUNTED_TOKENS))
            result = Generation(text, tokens, seconds, structure.shape.sparsity(counts.achieved()))
        finally:
            handle.restore()
    context.reporter.text(prompt + result.text)
    controls = count_controls(ids, tokenizer) - count_controls(np.asarray(beginning(tokenizer), np.int64), tokenizer)
    if controls > 0:
        context.reporter.note(f"{controls} control token(s) are named in the prompt")
    speed = f"{result.tokens} tokens in {result.seconds:.2f} s ({result.tokens / result.seconds:.1f} tokens/s)"
    sparsity = (
        "dense" if result.achieved is None else f"{100 * result.achieved:.1f} % of weights skipped in decode steps"
    )
    context.reporter.note(f"{speed}, {sparsity}, {context.placement_here.device}")
    context.reporter.result(
        {"text": result.text, "tokens": result.tokens, "seconds": result.seconds, "achieved": result.achieved}
    )
    return result


def _is_text(prompt: str) -> bool:
    """Whether there are no bytes of the command line in it that could not be read as text."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)
