"""The four operations that passes over the model are made of, as a set: plain torch, or fused kernels on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from was_search.masks.gradient_terms import PriceOp, SlopeOp, price_terms, slope_terms
from was_search.masks.histogram import CountOp, bin_counts
from was_search.masks.score import MaskOp, mask_input


@dataclass(frozen=True)
class Ops:
    """The operations of passes, in plain torch by default; ``was_kernels.pass_ops`` gives those that suit a device."""

    mask: MaskOp = mask_input
    count: CountOp = bin_counts
    price: PriceOp = price_terms
    slope: SlopeOp = slope_terms


PLAIN = Ops()
