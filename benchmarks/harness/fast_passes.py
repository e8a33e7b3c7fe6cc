"""Take score histograms of one small model again and again, replayed from CUDA graphs.

The results are those of :func:`was_search.masks.calibration.histogram_pass`, which it is tested against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.harness.fast_evaluator import use_causal_attention
from benchmarks.harness.fast_mask import masks
from benchmarks.harness.replays import Replays, chunks
from was_search.masks.histogram import N_BINS, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.shape import N_PROJECTIONS, FloatArray
from was_search.texts.protocol import TokenSet


class FastPasses:
    """Passes over ``data``: a :data:`was_search.masks.calibration.PassRunner`. Not thread-safe.

    Changes the model's attention implementation as :class:`benchmarks.harness.fast_evaluator.FastEvaluator` does, and
    takes ``pool`` as that.
    """

    def __init__(self, model: MaskedModel, data: TokenSet, *, pool: Any = None) -> None:
        self._model = model
        self._backbone = getattr(model.model, "model", model.model)
        self._prefix = data.protocol.dense_prefix
        self._tokens = torch.as_tensor(data.tokens, device=model.device)
        self._replays = Replays(self._forward, graphs=use_causal_attention(model.model, data.protocol), pool=pool)

    @torch.no_grad()
    def __call__(self, thresholds: npt.NDArray[np.float32] | None) -> tuple[Histograms, FloatArray]:
        """Histograms under ``thresholds`` [L, 7] (None: dense), and the sparsities achieved, float64 [L, 7]."""
        shape = (len(self._model.structure.blocks), N_PROJECTIONS)
        limits = np.zeros(shape, np.float32) if thresholds is None else np.ascontiguousarray(thresholds, np.float32)
        rows = torch.as_tensor(limits, device=self._tokens.device)
        index = torch.arange(len(self._tokens), device=self._tokens.device)
        counts = torch.zeros((*shape, N_BINS), dtype=torch.int64, device=index.device)
        dropped = torch.zeros(shape, dtype=torch.int64, device=index.device)
        for part in index.split(_sizes(*self._tokens.shape)):
            found = self._replays(part, rows.expand(len(part), *shape))
            counts += found[0]
            dropped += found[1].sum(dim=0)
        histograms = Histograms(counts.cpu().numpy())
        seen = np.maximum(histograms.counts.sum(axis=-1), 1)
        return histograms, dropped.cpu().numpy() / seen

    def _forward(self, index: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros((*thresholds.shape[1:], N_BINS), dtype=torch.int64, device=index.device)
        dropped = torch.zeros(thresholds.shape, dtype=torch.int32, device=index.device)

        def observe(b: int, p: int, scores: Tensor) -> None:
            counts[b, p] += self._model.ops.count(scores)

        with masks(self._model, thresholds, dropped, self._prefix, observe):
            self._backbone(input_ids=self._tokens[index], use_cache=False)
        return counts, dropped


def _sizes(n: int, length: int) -> list[int]:
    """Sizes of chunks of ``n`` sequences, the rest as one of its own: repeats to fill it up would be counted."""
    sizes, left = [], n
    for size in chunks(length):
        sizes += [size] * (left // size)
        left %= size
    return [*sizes, left] if left else sizes
