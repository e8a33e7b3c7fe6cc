"""The operations that passes over the model are made of, as a set: plain torch, or fused kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from was_search.masks.corrections import CorrectionTermsOp, CorrectOp, correct, correction_terms
from was_search.masks.gradient_terms import PriceOp, SlopeOp, price_terms, slope_terms
from was_search.masks.histogram import CountOp, bin_counts
from was_search.masks.score import MaskOp, mask_input

RecordOp = Callable[[Callable[[], Any], torch.device], tuple[Any, Any]]
"""Records what a call launches on a device: a CUDA graph, whose ``replay`` launches it again, and the call's result.

It raises RuntimeError where the call cannot be recorded.
"""


@dataclass(frozen=True)
class Ops:
    """The operations of passes, in plain torch by default; ``was_kernels.pass_ops`` gives those that suit a device.

    Attributes:
        record: None where nothing can be recorded.
    """

    mask: MaskOp = mask_input
    count: CountOp = bin_counts
    price: PriceOp = price_terms
    slope: SlopeOp = slope_terms
    correct: CorrectOp = correct
    correction: CorrectionTermsOp = correction_terms
    record: RecordOp | None = None


PLAIN = Ops()
