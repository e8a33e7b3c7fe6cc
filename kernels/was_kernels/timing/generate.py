"""Time a model's own ``generate``, dense and with plans by turns: the tokens that a user waits for."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_kernels.runtime.sparse_model import Backend, sparsify
from was_search.plan import Plan


@dataclass(frozen=True)
class TokenTimes:
    """Seconds between tokens of a text: the quickest, and the median of the quickest round."""

    least: float
    median: float

    @property
    def tokens_per_s(self) -> float:
        """By the median."""
        return 1.0 / self.median


class _Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, _: Tensor) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def token_times(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> list[float]:
    """Seconds of each one-token step of a greedy ``generate``, but for the first.

    Args:
        model: a transformers causal LM.
        prompt: int64 [rows, n].
        new_tokens: tokens that are decoded whatever they are; at least 4.
        options: further ones of ``generate``.
    """
    clock = _Clock()
    with torch.inference_mode():
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
    # The prompt comes first, then the token that is made from it, then that of the first step.
    came = clock.seconds[2:]
    return [after - before for before, after in itertools.pairwise(came)]


def beside_each_other(
    runs: Sequence[tuple[Any, Plan | None]],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    rounds: int = 3,
    backend: Backend = "auto",
    **options: Any,
) -> list[TokenTimes]:
    """Times of each model with its plan, or dense for None, over ``rounds`` rounds in which all take turns."""
    found: list[list[list[float]]] = [[] for _ in runs]
    for _ in range(rounds):
        for times, (model, plan) in zip(found, runs, strict=True):
            if plan is None:
                times.append(token_times(model, prompt, new_tokens, **options))
                continue
            with sparsify(model, plan, backend=backend):
                times.append(token_times(model, prompt, new_tokens, **options))
    return [TokenTimes(min(map(min, each)), min(map(statistics.median, each))) for each in found]
