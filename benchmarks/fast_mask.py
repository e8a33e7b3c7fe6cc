"""Mask with a threshold that lies on the device: ``y_j = x_j if abs(x_j) * norm_j >= threshold[0] else 0``.

``was_kernels.score_mask`` takes the threshold as a number, which a CUDA graph freezes at its capture. Here the
kernel reads it from memory, so that one graph serves every vector. Positions inside the dense prefix keep all
channels. The semantics are those of ``was_search.score.masked``, but for NaN inputs at a threshold of 0.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from was_search.score import scores

_BLOCK = 2048


@triton.jit
def _device_mask_kernel(
    x_ptr,  # [sequences, positions, d] contiguous
    norms_ptr,  # [d] float32
    threshold_ptr,  # [1] float32
    y_ptr,  # like x
    n,
    d,
    positions,
    dense_prefix,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    row = at // d
    x = tl.load(x_ptr + at, mask=there, other=0.0)
    norms = tl.load(norms_ptr + (at - row * d), mask=there, other=0.0)
    keep = tl.abs(x.to(tl.float32)) * norms >= tl.load(threshold_ptr)
    keep = keep | (row % positions < dense_prefix)
    tl.store(y_ptr + at, tl.where(keep, x, tl.zeros_like(x)), mask=there)


def device_mask(x: Tensor, norms: Tensor, threshold: Tensor, dense_prefix: int) -> Tensor:
    """x [sequences, positions, d] with the channels under ``threshold`` (float32 [1], on x's device) set to zero.

    On a GPU one Triton kernel, elsewhere plain torch (or Triton's interpreter, if it was asked for).
    """
    if x.is_cuda == isinstance(_device_mask_kernel, JITFunction):
        source = x.contiguous()
        y = torch.empty_like(source)
        _device_mask_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            source, norms, threshold, y, x.numel(), x.shape[-1], x.shape[1], dense_prefix, BLOCK=_BLOCK, num_warps=4
        )
        return y
    keep = scores(x, norms) >= threshold
    keep[:, :dense_prefix] = True
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))
