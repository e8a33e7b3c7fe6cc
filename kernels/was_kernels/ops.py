"""The operations that calibration, pricing, slopes and evaluation run on, as they suit a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from was_kernels import available
from was_search.histogram import CountOp, bin_counts
from was_search.pricing import PriceOp, price_terms
from was_search.score import MaskOp, mask_input
from was_search.slope import SlopeOp, slope_terms


@dataclass(frozen=True)
class Ops:
    """One implementation of each; plain torch by default."""

    mask: MaskOp = mask_input
    count: CountOp = bin_counts
    price: PriceOp = price_terms
    slope: SlopeOp = slope_terms


def ops_for(device: str | torch.device) -> Ops:
    """The fused Triton ops where ``device`` is a GPU that runs the kernels, plain torch elsewhere."""
    if torch.device(device).type != "cuda" or not available()[0]:
        return Ops()
    from was_kernels import gradient_passes
    from was_kernels.mask_input import mask_input as fused_mask_input

    return Ops(fused_mask_input, gradient_passes.count_scores, gradient_passes.price_terms, gradient_passes.slope_terms)
