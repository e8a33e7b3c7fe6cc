"""Take score histograms: on the dense model, and again at an operating point.

Histograms of the dense model overshoot once earlier layers are sparse: the activations that reach a projection
are no longer those that its threshold was read from. So thresholds are re-read from histograms taken while the
model is masked, until what is counted meets what was asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from was_search.masks.histogram import N_BINS, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray, ModelShape
from was_search.texts.protocol import TokenSet

PassRunner = Callable[[npt.NDArray[np.float32] | None], tuple[Histograms, FloatArray]]
"""A pass: thresholds [L, 7] or None -> histograms under these masks, achieved sparsities [L, 7] (float64)."""


@torch.inference_mode()
def histogram_pass(
    model: MaskedModel, data: TokenSet, thresholds: npt.NDArray[np.float32] | None
) -> tuple[Histograms, IntArray, IntArray]:
    """One pass over ``data`` under ``thresholds`` (None: dense).

    Returns histograms of the scores before masking, and the channels seen and dropped, int64 [L, 7] each. All
    three add up over shards of the tokens.
    """
    L = len(model.structure.blocks)
    totals: dict[tuple[int, int], Tensor] = {}
    dropped: dict[tuple[int, int], Tensor] = {}

    def observe(b: int, p: int, scores: Tensor) -> None:
        counts = model.ops.count(scores)
        totals[b, p] = totals[b, p] + counts if (b, p) in totals else counts
        if thresholds is not None:
            under = (scores < float(thresholds[b, p])).sum()
            dropped[b, p] = dropped[b, p] + under if (b, p) in dropped else under

    with Masking(model, thresholds, dense_prefix=data.protocol.dense_prefix, observer=observe):
        backbone = getattr(model.model, "model", model.model)
        for batch in model.batches(data):
            backbone(input_ids=batch, use_cache=False)
    counts = np.zeros((L, N_PROJECTIONS, N_BINS), np.int64)
    under_counts = np.zeros((L, N_PROJECTIONS), np.int64)
    for (b, p), value in totals.items():
        counts[b, p] = value.cpu().numpy()
    for (b, p), value in dropped.items():
        under_counts[b, p] = int(value)
    shape = model.shape
    counts = shape.copied(counts)
    return Histograms(counts), counts.sum(axis=-1), shape.copied(under_counts)


def operating_point(
    run_pass: PassRunner,
    dense: Histograms,
    sparsities: FloatArray,
    shape: ModelShape,
    *,
    tolerance: float = 5e-4,
    max_passes: int = 6,
) -> tuple[Histograms, npt.NDArray[np.float32], FloatArray, int]:
    """Re-take histograms under the masks of nominal ``sparsities`` [L, 7] until nominal is achieved.

    Every pass masks with the thresholds that the pass before it gave. The first projections of the first block
    are exact at once, later ones settle after them.

    Args:
        run_pass: masks with given thresholds and takes histograms.
        dense: histograms of the dense model.
        sparsities: the nominal point.
        shape: its parameters weigh the projections.
        tolerance: greatest difference between nominal and achieved, of the model and (ten times this) of any
            projection, at which the passes end.
        max_passes: passes after which to give up and return the last result.

    Returns:
        Histograms at the point; the thresholds that were in force when ``achieved`` was counted; achieved [L, 7];
        the number of passes.
    """
    thresholds = dense.thresholds(sparsities)
    for done in range(1, max_passes + 1):
        histograms, achieved = run_pass(thresholds)
        off = abs(shape.sparsity(achieved) - shape.sparsity(sparsities))
        worst = float(np.abs(achieved - sparsities).max())
        if (off <= tolerance and worst <= 10 * tolerance) or done == max_passes:
            return histograms, thresholds, achieved, done
        thresholds = histograms.thresholds(sparsities)
    raise AssertionError("max_passes must be at least 1")
