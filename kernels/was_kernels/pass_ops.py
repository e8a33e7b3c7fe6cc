"""The operations that passes over the model are made of (``was_search.masks.ops``), chosen for a device."""

from __future__ import annotations

import torch

from was_kernels import triton_available
from was_search.masks.ops import Ops


def ops_for(device: str | torch.device) -> Ops:
    """The fused Triton ops where ``device`` is a GPU that runs the kernels, plain torch elsewhere."""
    if torch.device(device).type != "cuda" or not triton_available()[0]:
        return Ops()
    from was_kernels.ops import correction_passes, gradient_passes
    from was_kernels.ops.mask_input import mask_input as fused_mask_input
    from was_kernels.runtime.capture import captured

    return Ops(
        fused_mask_input,
        gradient_passes.count_scores,
        gradient_passes.price_terms,
        gradient_passes.slope_terms,
        correction_passes.correct,
        correction_passes.correction_terms,
        captured,
    )
