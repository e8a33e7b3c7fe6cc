"""Evaluate many vectors on one small model: thresholds on the device, one CUDA graph for each chunk size.

The results are those of :func:`was_search.evaluation.evaluate_thresholds`, which it is tested against. A forward of
a small model on a large GPU is bound by launching some thousand kernels; a graph launches them at once. For that
nothing in the forward may ask the host: thresholds are a tensor [L, 7] that the hooks read, token buffers are
static, and attention is a function of our own without a mask. transformers would compare position ids on the host
before it decides to need no mask, and build one while a graph is captured, where it cannot compare.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.fast_mask import device_mask
from was_search.evaluation import sequence_nats
from was_search.protocol import TokenSet
from was_search.shape import FloatArray, IntArray
from was_search.structure import Structure

CHUNKS = (64, 32, 16, 8)
"""Sequences of one forward; an evaluation is made of these, largest first."""

_ATTENTION = "was_causal"


class FastEvaluator:
    """Losses of sequences under thresholds. Not thread-safe; owns one stream's graphs.

    Changes the model's attention implementation, unless a sliding window binds; then there are no graphs either.

    Args:
        model: a causal LM in evaluation mode.
        structure: its blocks.
        norms: from ``structure_norms``.
        data: the sequences.
        graphs: capture CUDA graphs; None: on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        norms: list[list[Tensor]],
        data: TokenSet,
        *,
        graphs: bool | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._structure = structure
        self._norms = norms
        self._protocol = data.protocol
        self._tokens = torch.as_tensor(data.tokens, device=device)
        self._thresholds = torch.zeros((len(structure.blocks), 7), device=device)
        self._graphs = device.type == "cuda" if graphs is None else graphs
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self._graphs else None
        if _has_window(model, data.protocol.sequence_length):
            self._graphs = False
        else:
            _use_causal_attention(model)

    @property
    def graphs(self) -> bool:
        """Whether evaluations are replayed from graphs."""
        return self._graphs

    @torch.no_grad()
    def losses(self, thresholds: npt.NDArray[np.float32], sequences: IntArray | None = None) -> FloatArray:
        """Mean nats per predicted token of ``sequences`` (indices [n]; None: all) under ``thresholds`` [L, 7].

        float64 [n]. A sequence's loss may depend in the last digits on the chunk that it is evaluated in.
        """
        wanted = np.arange(len(self._tokens)) if sequences is None else np.asarray(sequences, np.int64)
        if len(wanted) == 0:
            return np.zeros(0)
        padded, sizes = _chunks(wanted)
        self._thresholds.copy_(torch.from_numpy(np.ascontiguousarray(thresholds, np.float32)))
        index = torch.as_tensor(padded, device=self._tokens.device)
        found, start = [], 0
        for size in sizes:
            found.append(self._run(index[start : start + size]))
            start += size
        nats = torch.cat(found).cpu().numpy().astype(np.float64)
        return nats[: len(wanted)] / self._protocol.predicted_per_sequence

    def _run(self, index: Tensor) -> Tensor:
        size = len(index)
        if self._graphs and size not in self._captured:
            self._capture(size)
        if not self._graphs:
            return self._forward(self._tokens[index])
        graph, tokens, nats = self._captured[size]
        torch.index_select(self._tokens, 0, index, out=tokens)
        graph.replay()
        return nats.clone()  # the next replay of this graph writes over it

    def _capture(self, size: int) -> None:
        tokens = self._tokens[:1].repeat(size, 1)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles kernels, allocates cuBLAS's workspaces
                    self._forward(tokens)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                nats = self._forward(tokens)
        except RuntimeError as error:
            self._graphs = False
            self._captured.clear()
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"no CUDA graph could be captured, evaluations will be slower: {reason}", stacklevel=2)
            return
        self._captured[size] = (graph, tokens, nats)

    def _forward(self, tokens: Tensor) -> Tensor:
        with self._hooks():
            return sequence_nats(self._model, tokens, self._protocol.predicted_per_sequence)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            linear.register_forward_pre_hook(self._hook(self._norms[b][p], self._thresholds[b, p : p + 1]))
            for b, p, linear in self._structure.linears()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, norms: Tensor, threshold: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        prefix = self._protocol.dense_prefix

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            return (device_mask(args[0], norms, threshold, prefix),)

        return hook


def _chunks(sequences: IntArray) -> tuple[IntArray, list[int]]:
    """``sequences`` filled up with repeats to whole chunks, and the chunks' sizes."""
    sizes, left = [], len(sequences)
    for size in CHUNKS:
        sizes += [size] * (left // size)
        left %= size
    if left:
        sizes.append(CHUNKS[-1])
    return np.resize(sequences, sum(sizes)), sizes


def _has_window(model: Any, sequence_length: int) -> bool:
    window = getattr(model.config, "sliding_window", None)
    return window is not None and window < sequence_length


def _use_causal_attention(model: Any) -> None:
    # A registered name without a mask function of its own gets no mask from transformers.
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _causal_attention)
    model.set_attn_implementation(_ATTENTION)


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[batch, heads, positions, head size] -> [batch, positions, heads, head size]; whole sequences, no cache.

    Keys and values are repeated by hand: with ``enable_gqa`` float32 would take the slow kernel.
    """
    if attention_mask is not None:
        raise ValueError("attention_mask: must be None, the benchmark evaluates whole sequences")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
