"""What the backward of one projection's input computes, in plain torch: prices, and the slope of a masked input.

:mod:`was_search.masks.pricing` and :mod:`was_search.masks.slope` say what the terms mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from was_search.masks.histogram import bin_counts
from was_search.masks.score import or_zero, scores

PriceOp = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""A function like :func:`price_terms`; a fused one may take its place."""

SlopeOp = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor, Tensor]]
"""A function like :func:`slope_terms`; a fused one may take its place."""


def price_terms(x: Tensor, gradient: Tensor, norms: Tensor, bounds: Tensor, prefix: int) -> Tensor:
    """Prices of one input at every level, summed over its tokens after the prefix: float64 [G].

    Args:
        x: [sequences, positions, d].
        gradient: like x, of the summed nats at x.
        norms: [d] float32.
        bounds: float32 [G], the levels' thresholds, rising.
        prefix: positions that are never masked.
    """
    x = x[:, prefix:].flatten(0, 1)
    contribution = gradient[:, prefix:].flatten(0, 1).float() * x.float()
    # Bin i holds the channels dropped at level i but not at level i - 1; the last bin is never dropped.
    bins = torch.searchsorted(bounds, scores(x, norms), right=True)
    binned = contribution.new_zeros((len(x), len(bounds) + 1)).scatter_add_(1, bins, contribution)
    change = binned.cumsum(1)[:, :-1].double()
    return 0.5 * change.square().sum(0)


def slope_terms(
    x: Tensor, gradient: Tensor, norms: Tensor, limits: Tensor, width: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of one mask: the gradient with the band's term, the loss's change and the scores' counts.

    Args:
        x: [sequences, positions, d], the input before masking.
        gradient: like x, of the loss at the masked input.
        norms: [d] float32.
        limits: float32 [3]: the threshold, and the scores between which the slope is taken.
        width: half width of the band, :data:`was_search.masks.slope.BOUNDARY_WIDTH`.
        prefix: positions that are never masked.

    Returns:
        The gradient at x, in the gradient's dtype; the change of the loss when the channels between the limits are
        dropped, float64 scalar; counts of the scores after the prefix, int64 [32768].
    """
    threshold, low, high = limits
    score = scores(x[:, prefix:], norms)
    body = gradient[:, prefix:].float()
    inside = (score >= low) & (score < high)
    change = -or_zero(inside, body * x[:, prefix:].float()).sum(dtype=torch.float64)
    factor = (score >= threshold).float()
    reach = width * threshold
    # Not times a mask: an infinite score outside of the band would become NaN.
    factor += or_zero((score - threshold).abs() < reach, score) / (2.0 * reach).clamp_min(1e-30)
    passed = torch.cat([gradient[:, :prefix], (body * factor).to(gradient.dtype)], dim=1)
    return passed, change, bin_counts(score)
