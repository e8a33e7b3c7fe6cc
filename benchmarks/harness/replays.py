"""Forwards replayed from CUDA graphs, one for each number of sequences.

A forward of a small model on a large GPU is bound by launching some thousand kernels; a graph launches them at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNKS = (64, 32, 16, 8)
"""Numbers of sequences in a forward that graphs are captured for."""

MOST_TOKENS = 16_384
"""Tokens of a forward, unless the smallest chunk has more: these fill a GPU, and their logits leave room for others."""

Forward = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""A forward: (indices of sequences int64 [n], thresholds float32 [n, L, 7]) -> tensors; asks the host for nothing."""


def chunks(sequence_length: int) -> tuple[int, ...]:
    """Those of :data:`CHUNKS` that sequences of this length are evaluated in, largest first."""
    return tuple(size for size in CHUNKS if size * sequence_length <= MOST_TOKENS) or CHUNKS[-1:]


class Replays:
    """Calls ``forward``, from a graph where the number of sequences is one of :data:`CHUNKS`.

    Not thread-safe; owns its graphs. Where a capture fails, it says so once and goes on without graphs.

    Args:
        forward: what is called.
        graphs: whether to capture graphs of it.
        pool: memory of graphs (``torch.cuda.graph_pool_handle``) to share with others that are called by turns with
            this one: results are copied out of it at once. None: its own.
    """

    def __init__(self, forward: Forward, *, graphs: bool, pool: Any = None) -> None:
        self._forward = forward
        self._graphs = graphs
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, tuple[Tensor, ...]]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if graphs and pool is None else pool

    @property
    def graphs(self) -> bool:
        """Whether calls are replayed from graphs."""
        return self._graphs

    @property
    def sizes(self) -> list[int]:
        """Numbers of sequences for which graphs were captured."""
        return sorted(self._captured)

    def __call__(self, index: Tensor, thresholds: Tensor) -> tuple[Tensor, ...]:
        size = len(index)
        if self._graphs and size in CHUNKS and size not in self._captured:
            self._capture(index, thresholds)
        if size not in self._captured:
            return self._forward(index, thresholds)
        graph, own_index, own_thresholds, found = self._captured[size]
        own_index.copy_(index)
        own_thresholds.copy_(thresholds)
        graph.replay()
        return tuple(tensor.clone() for tensor in found)  # the next replay of this graph writes over them

    def _capture(self, index: Tensor, thresholds: Tensor) -> None:
        index, thresholds = index.clone(), thresholds.clone()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles kernels, allocates cuBLAS's workspaces
                    self._forward(index, thresholds)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = self._forward(index, thresholds)
        except RuntimeError as error:
            self._graphs = False
            self._captured.clear()
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"no CUDA graph could be captured, evaluations will be slower: {reason}", stacklevel=3)
            return
        self._captured[len(index)] = (graph, index, thresholds, found)
