"""Mask a projection's input, leave the dense prefix alone and count what is kept, in one read and one write.

``was_search.masks.score.mask_input`` is the reference, the same bit for bit. Plain torch takes nine passes, and
the fused score and mask alone still needs a copy to put the prefix back and a pass to count.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_kernels.ops.triton_launch import on_device_of

_ROWS = 4
_COLUMNS = 1024


@triton.jit
def _mask_input_kernel(
    x_ptr,  # [n_rows, d] contiguous
    norms_ptr,  # [d] float32
    y_ptr,  # like x
    kept_ptr,  # [programs] int32
    n_rows,
    d,
    positions,
    prefix,
    threshold,  # a number, or [1] float32
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < n_rows)[:, None] & (columns < d)[None, :]
    at = rows.to(tl.int64)[:, None] * d + columns[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0.0)
    norms = tl.load(norms_ptr + columns, mask=columns < d, other=0.0)
    if STORED:
        keep = tl.abs(x.to(tl.float32)) * norms[None, :] >= tl.load(threshold)
    else:
        keep = tl.abs(x.to(tl.float32)) * norms[None, :] >= threshold
    body = there & (rows % positions >= prefix)[:, None]
    tl.store(y_ptr + at, tl.where(keep | ~body, x, tl.zeros_like(x)), mask=there)
    kept = tl.sum(tl.sum((keep & body).to(tl.int32), axis=1), axis=0)
    tl.store(kept_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), kept)


def mask_input(x: Tensor, norms: Tensor, threshold: float | Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """``x`` with channels of a score under ``threshold`` set to zero after the prefix, and how many were kept.

    Args:
        x: [sequences, positions, d], fp16, bf16 or fp32.
        norms: [d] float32.
        threshold: above 0, or a float32 scalar on x's device, which may be 0 as well.
        prefix: positions at a sequence's start that keep all channels.

    Returns:
        A tensor like x; and the number of kept channels after the prefix, int64 scalar on x's device.
    """
    source = x.contiguous()
    y = torch.empty_like(source)
    d, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    grid = (triton.cdiv(n_rows, _ROWS), triton.cdiv(d, _COLUMNS))
    kept = torch.empty(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    with on_device_of(x):
        _mask_input_kernel[grid](
            source,
            norms,
            y,
            kept,
            n_rows,
            d,
            x.shape[1],
            prefix,
            threshold,
            STORED=isinstance(threshold, Tensor),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return y, kept.sum(dtype=torch.int64)
