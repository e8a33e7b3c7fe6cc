"""Tokens a second that a caller gets: of the decoding loop, and of transformers' ``generate``."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from was_kernels.runtime.decoding_loop import DecodingLoop
from was_kernels.timing.generate import token_times


def loop_rate(loop: DecodingLoop, ids: Tensor, new_tokens: int) -> float:
    """Tokens of all rows a second after each row's first, of a second text: caches and graphs are there.

    Args:
        loop: decodes greedily.
        ids: int64 [rows, n], the prompts.
        new_tokens: of each row, at least 2.
    """
    for _ in range(2):
        marks = [time.perf_counter() for _ in loop.stream(ids, max_new_tokens=new_tokens, eos=())]
    return len(ids) * (new_tokens - 1) / (marks[-1] - marks[0])


def generate_rate(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> float:
    """The same of ``model.generate`` with ``options``, greedy; of at least 4 new tokens."""
    for _ in range(2):
        seconds = token_times(model, ids, new_tokens, **options)
    return len(ids) * len(seconds) / sum(seconds)
