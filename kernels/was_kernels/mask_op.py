"""The masking operation that suits a device."""

from __future__ import annotations

import torch

from was_kernels import available
from was_search.score import MaskOp, masked


def mask_op_for(device: str | torch.device) -> MaskOp:
    """The fused Triton op where ``device`` is a GPU that runs the kernels, plain torch elsewhere."""
    if torch.device(device).type != "cuda" or not available()[0]:
        return masked
    from was_kernels.score_mask import score_mask

    return score_mask
