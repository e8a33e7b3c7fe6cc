"""Triton bodies of the sparse GEMV; :mod:`was_kernels.sparse_gemv` holds the formula, the tiling and the op.

Loads are predicated by the keep mask: a channel that is dropped costs no memory traffic. Every mask is exact,
so that shapes need not be multiples of the blocks. Within a tile offsets are int32, between tiles int64.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import triton
import triton.language as tl


@triton.jit
def row_kernel(
    x_ptr,  # [d_in]
    weight_ptr,  # [d_in, d_out] contiguous
    norms_ptr,  # [d_in] float32
    dense_ptr,  # [1] uint8, read only if HAS_DENSE
    partial_ptr,  # [splits, 1, d_out] float32
    d_in,
    d_out,
    threshold,
    KEEP_ALL: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One row: products on the plain cores, summed per lane and reduced once at the end."""
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_there = out < d_out
    lanes = tl.arange(0, BLOCK_IN)
    first = split * STEPS * BLOCK_IN
    total = tl.zeros((BLOCK_IN, BLOCK_OUT), dtype=tl.float32)
    tile = lanes[:, None] * d_out + out[None, :]  # int32 holds it: a tile has BLOCK_IN rows
    if HAS_DENSE:
        everything = tl.load(dense_ptr + lanes * 0) != 0
    x = tl.load(x_ptr + first + lanes, mask=first + lanes < d_in, other=0.0).to(tl.float32)
    norms = tl.load(norms_ptr + first + lanes, mask=first + lanes < d_in, other=0.0)
    for step in range(STEPS):
        start = first + step * BLOCK_IN
        keep = start + lanes < d_in
        if not KEEP_ALL:
            scored = tl.abs(x) * norms >= threshold
            if HAS_DENSE:
                scored = scored | everything
            keep = keep & scored
        x_kept = tl.where(keep, x, 0.0)  # not only predicated off: a dropped NaN must not reach the sum
        # The start in int64: d_in * d_out may exceed 2**31 in a language model's head.
        weight = tl.load(
            weight_ptr + start.to(tl.int64) * d_out + tile,
            mask=keep[:, None] & out_there[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        # The next tile's mask is on its way while this tile's weights are.
        ahead = start + BLOCK_IN + lanes
        x = tl.load(x_ptr + ahead, mask=ahead < d_in, other=0.0).to(tl.float32)
        norms = tl.load(norms_ptr + ahead, mask=ahead < d_in, other=0.0)
        total += weight.to(tl.float32) * x_kept[:, None]
    tl.store(partial_ptr + split * d_out + out, tl.sum(total, axis=0), mask=out_there)


@triton.jit
def batch_kernel(
    x_ptr,  # [rows, d_in], last stride 1
    weight_ptr,  # [d_in, d_out] contiguous
    norms_ptr,  # [d_in] float32
    dense_ptr,  # [rows] uint8, read only if HAS_DENSE
    partial_ptr,  # [splits, rows, d_out] float32
    n_rows,
    d_in,
    d_out,
    stride_row,
    threshold,
    KEEP_ALL: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    UPCAST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Up to BLOCK_ROWS rows: each masked by itself, weights read where any of them keeps the channel."""
    split = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_there = rows < n_rows
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_there = out < d_out
    lanes = tl.arange(0, BLOCK_IN)
    first = split * STEPS * BLOCK_IN
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    tile = lanes[:, None] * d_out + out[None, :]
    x_rows = rows.to(tl.int64) * stride_row
    if HAS_DENSE:
        everything = tl.load(dense_ptr + rows, mask=row_there, other=0) != 0
    for step in range(STEPS):
        start = first + step * BLOCK_IN
        channels = start + lanes
        there = row_there[:, None] & (channels < d_in)[None, :]
        x = tl.load(x_ptr + x_rows[:, None] + channels[None, :], mask=there, other=0.0)
        keep = there
        if not KEEP_ALL:
            norms = tl.load(norms_ptr + channels, mask=channels < d_in, other=0.0)
            scored = tl.abs(x.to(tl.float32)) * norms[None, :] >= threshold
            if HAS_DENSE:
                scored = scored | everything[:, None]
            keep = keep & scored
        x_kept = tl.where(keep, x, tl.zeros_like(x))
        wanted = tl.max(keep.to(tl.int32), axis=0) > 0
        weight = tl.load(
            weight_ptr + start.to(tl.int64) * d_out + tile,
            mask=wanted[:, None] & out_there[None, :],
            other=0.0,
        )
        if UPCAST:  # the interpreter has no bfloat16 product
            x_kept = x_kept.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x_kept, weight, total, input_precision="ieee")
    place = (split.to(tl.int64) * n_rows + rows) * d_out
    tl.store(partial_ptr + place[:, None] + out[None, :], total, mask=row_there[:, None] & out_there[None, :])


@triton.jit
def reduce_kernel(
    partial_ptr,  # [splits, rows, d_out] float32
    bias_ptr,  # [d_out], read only if HAS_BIAS
    y_ptr,  # [rows, d_out] contiguous
    n_rows,
    d_out,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums in order of split, then the bias, then one rounding to y's dtype."""
    row = tl.program_id(0)  # the first axis has no limit of 65,535
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = out < d_out
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        place = (row + split * n_rows).to(tl.int64) * d_out
        total += tl.load(partial_ptr + place + out, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * d_out + out, total.to(y_ptr.dtype.element_ty), mask=there)
