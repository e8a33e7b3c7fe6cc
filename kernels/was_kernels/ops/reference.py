"""The ops in plain torch: what the kernels must compute, and what runs where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from was_kernels.ops.column_weight import SparseMap


def kept_channels(x: Tensor, norms: Tensor, threshold: float, dense: Tensor | None = None) -> Tensor:
    """Which channels are kept: ``abs(x) * norms >= threshold`` in float32, or all of them.

    A NaN score is not kept. A threshold of zero or less keeps everything, NaN included.

    Args:
        x: [..., d], any float dtype.
        norms: [d] float32.
        threshold: the score under which a channel is dropped.
        dense: bool, one flag per row of x (``x.numel() / d`` of them): rows that keep every channel.

    Returns:
        bool [..., d].
    """
    if threshold <= 0.0:
        return torch.ones_like(x, dtype=torch.bool)
    keep = x.detach().abs().float() * norms >= threshold
    return keep if dense is None else keep | dense.reshape(*x.shape[:-1], 1)


def score_mask_reference(x: Tensor, norms: Tensor, threshold: float, dense: Tensor | None = None) -> Tensor:
    """x [..., d] with dropped channels set to zero, in x's dtype; arguments as :func:`kept_channels`."""
    if threshold <= 0.0:
        return x
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(kept_channels(x, norms, threshold, dense), x, zero)


def sparse_gemv_reference(x: Tensor, sparse: SparseMap, dense: Tensor | None = None) -> Tensor:
    """``y[b] = W[:, kept(b)] @ x[b, kept(b)] + bias``, or corrected, summed in float32, in x's dtype.

    Args:
        x: [B, d_in].
        sparse: W, bias, correction, and what is kept; every row has its own mask.
        dense: bool [B]: rows that keep every channel and are not corrected.

    Returns:
        [B, width] in x's dtype.
    """
    kept = score_mask_reference(x, sparse.norms, sparse.threshold, dense)
    y = kept.float() @ sparse.weight.written_out().float()
    bias = None if sparse.bias is None else sparse.bias.float()
    if sparse.correction is not None:
        y = sparse.correction.applied(y, bias, dense)
    elif bias is not None:
        y = y + bias
    return y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Llama's RMSNorm over the last axis: the mean of squares in float32, one rounding before the weight, one after."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
