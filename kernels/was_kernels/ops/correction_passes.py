"""Correct a projection's outputs by a compensation, and the backward of that, in one read of what each needs.

``was_search.masks.corrections.correct`` and ``was_search.masks.corrections.correction_terms`` are the references. Sums
over tokens are formed in float32, in a fixed order: two runs give the same bits.
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
_TERM_ROWS = 32
_TERM_COLUMNS = 128
_TERM_BLOCKS = 32


@triton.jit
def _correct_kernel(
    y_ptr,  # [n_rows, d] contiguous
    scale_ptr,  # [d] float32
    constant_ptr,  # [d] float32
    out_ptr,  # like y
    n_rows,
    d,
    positions,
    prefix,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < n_rows)[:, None] & (columns < d)[None, :]
    at = rows.to(tl.int64)[:, None] * d + columns[None, :]
    scale = tl.load(scale_ptr + columns, mask=columns < d, other=0.0)
    constant = tl.load(constant_ptr + columns, mask=columns < d, other=0.0)
    y = tl.load(y_ptr + at, mask=there, other=0.0)
    corrected = constant[None, :] + y.to(tl.float32) * scale[None, :]
    body = (rows % positions >= prefix)[:, None]
    tl.store(out_ptr + at, tl.where(body, corrected.to(y.dtype), y), mask=there)


@triton.jit
def _terms_kernel(
    y_ptr,  # [n_rows, d] contiguous
    gradient_ptr,  # like y
    scale_ptr,  # [d] float32
    passed_ptr,  # like y
    sums_ptr,  # [programs of rows, 2, d] float32
    n_rows,
    d,
    positions,
    prefix,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    products = tl.zeros((COLUMNS,), tl.float32)
    gradients = tl.zeros((COLUMNS,), tl.float32)
    for step in range(steps):
        rows = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        there = (rows < n_rows)[:, None] & inside[None, :]
        body = (rows % positions >= prefix)[:, None]
        at = rows.to(tl.int64)[:, None] * d + columns[None, :]
        gradient = tl.load(gradient_ptr + at, mask=there, other=0.0)
        y = tl.load(y_ptr + at, mask=there, other=0.0)
        wide = gradient.to(tl.float32)
        passed = tl.where(body, (wide * scale[None, :]).to(gradient.dtype), gradient)
        tl.store(passed_ptr + at, passed, mask=there)
        products += tl.sum(tl.where(body, wide * y.to(tl.float32), 0.0), axis=0)
        gradients += tl.sum(tl.where(body, wide, 0.0), axis=0)
    to = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * d + columns
    tl.store(to, products, mask=inside)
    tl.store(to + d, gradients, mask=inside)


def correct(y: Tensor, scale: Tensor, constant: Tensor, prefix: int) -> Tensor:
    """``scale * y + constant`` after the prefix, in y's dtype.

    Args:
        y: [sequences, positions, d], fp16, bf16 or fp32.
        scale: [d] float32.
        constant: [d] float32.
        prefix: positions at a sequence's start that are left as they are.
    """
    y = y.contiguous()
    d, n_rows = y.shape[-1], y.numel() // y.shape[-1]
    out = torch.empty_like(y)
    with on_device_of(y):
        _correct_kernel[(triton.cdiv(n_rows, _ROWS), triton.cdiv(d, _COLUMNS))](
            y, scale, constant, out, n_rows, d, y.shape[1], prefix, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
    return out


def correction_terms(y: Tensor, gradient: Tensor, scale: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The backward of :func:`correct`: the gradient at y, like y, and that in scale and constant, float32 [2, d].

    Args:
        y: what was corrected.
        gradient: of the corrected one, like y.
        scale: [d] float32.
        prefix: positions at a sequence's start that were left as they are.
    """
    y, gradient = y.contiguous(), gradient.contiguous()
    d, n_rows = y.shape[-1], y.numel() // y.shape[-1]
    steps = max(1, triton.cdiv(n_rows, _TERM_BLOCKS * _TERM_ROWS))
    grid = (triton.cdiv(n_rows, steps * _TERM_ROWS), triton.cdiv(d, _TERM_COLUMNS))
    passed = torch.empty_like(gradient)
    sums = torch.empty((grid[0], 2, d), dtype=torch.float32, device=y.device)
    with on_device_of(y):
        _terms_kernel[grid](
            y,
            gradient,
            scale,
            passed,
            sums,
            n_rows,
            d,
            y.shape[1],
            prefix,
            steps,
            ROWS=_TERM_ROWS,
            COLUMNS=_TERM_COLUMNS,
            num_warps=4,
        )
    return passed, sums.sum(0)
