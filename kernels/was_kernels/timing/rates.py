"""Tokens a second that a caller gets: of the decoding loop, and of transformers' ``generate``."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from was_kernels.runtime.decoding_loop import DecodingLoop


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
    """The same of ``model.generate`` with ``options``, greedy, as :func:`loop_rate` counts."""
    for _ in range(2):
        clock = _Clock()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **options,
            )
    return len(ids) * (new_tokens - 1) / (clock.marks[-1] - clock.marks[1])


class _Clock(BaseStreamer):
    """When ``generate`` handed over the prompt, and then each token."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def put(self, value: Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass
