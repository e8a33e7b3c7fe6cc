"""Triton bodies of the sparse GEMV; :mod:`was_kernels.ops.sparse_gemv` holds the formula, the tiling and the op.

Loads are predicated by the keep mask: a channel that is dropped costs no memory traffic. Every mask is exact,
so that shapes need not be multiples of the blocks. Within a tile offsets are int32, between tiles int64.

Weights have BITS 16 or 32 as stored, or 8 or 4: bytes of one value at 8 bits and of two at 4, the first in the low
half, and a scale and an offset for each channel and tile of outputs, which lies within one GROUP of them. A tile's
columns ("places") are outputs, or at 4 bits pairs of outputs, summed in ``low`` and ``high``.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import triton
import triton.language as tl


@triton.jit
def _load_scales(scales_ptr, channels, n_groups, group, wanted):
    """Scale and offset of each of ``channels`` in float32 columns; zero where not ``wanted``."""
    pair = scales_ptr + (channels.to(tl.int64) * n_groups + group) * 2
    scale = tl.load(pair, mask=wanted, other=0.0).to(tl.float32)
    offset = tl.load(pair + 1, mask=wanted, other=0.0).to(tl.float32)
    return scale[:, None], offset[:, None]


@triton.jit
def row_kernel(
    x_ptr,  # [d_in]
    weight_ptr,  # [d_in, row_length] contiguous: x's dtype, or uint8
    scales_ptr,  # [d_in, n_groups, 2] float16 contiguous, read only if BITS < 16
    norms_ptr,  # [d_in] float32
    dense_ptr,  # [1] uint8, read only if HAS_DENSE
    partial_ptr,  # [splits, 1, d_out] float32
    d_in,
    d_out,
    row_length,
    n_groups,
    threshold,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One row: products on the plain cores, summed per lane and reduced once at the end."""
    split = tl.program_id(1)
    each: tl.constexpr = 2 if BITS == 4 else 1
    width: tl.constexpr = BLOCK_OUT // each
    places = tl.program_id(0) * width + tl.arange(0, width)
    there = places < row_length
    lanes = tl.arange(0, BLOCK_IN)
    first = split * STEPS * BLOCK_IN
    low = tl.zeros((BLOCK_IN, width), dtype=tl.float32)
    high = tl.zeros((BLOCK_IN, width), dtype=tl.float32)
    tile = lanes[:, None] * row_length + places[None, :]  # int32 is enough: a tile has BLOCK_IN rows
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
        # The start in int64: d_in * row_length may exceed 2**31 in a language model's head.
        weight = tl.load(
            weight_ptr + start.to(tl.int64) * row_length + tile,
            mask=keep[:, None] & there[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        if BITS < 16:
            group = tl.program_id(0) * BLOCK_OUT // GROUP
            scale, offset = _load_scales(scales_ptr, start + lanes, n_groups, group, keep)
        # The next tile's mask is on its way while this tile's weights are.
        ahead = start + BLOCK_IN + lanes
        x = tl.load(x_ptr + ahead, mask=ahead < d_in, other=0.0).to(tl.float32)
        norms = tl.load(norms_ptr + ahead, mask=ahead < d_in, other=0.0)
        if BITS >= 16:
            low += weight.to(tl.float32) * x_kept[:, None]
        elif BITS == 8:
            low += (weight.to(tl.float32) * scale + offset) * x_kept[:, None]
        else:
            low += ((weight & 15).to(tl.float32) * scale + offset) * x_kept[:, None]
            high += ((weight >> 4).to(tl.float32) * scale + offset) * x_kept[:, None]
    out = partial_ptr + split * d_out + places * each
    tl.store(out, tl.sum(low, axis=0), mask=places * each < d_out)
    if BITS == 4:
        tl.store(out + 1, tl.sum(high, axis=0), mask=places * each + 1 < d_out)


@triton.jit
def batch_kernel(
    x_ptr,  # [rows, d_in], last stride 1
    weight_ptr,  # [d_in, row_length] contiguous: x's dtype, or uint8
    scales_ptr,  # [d_in, n_groups, 2] float16 contiguous, read only if BITS < 16
    norms_ptr,  # [d_in] float32
    dense_ptr,  # [rows] uint8, read only if HAS_DENSE
    partial_ptr,  # [splits, rows, d_out] float32
    n_rows,
    d_in,
    d_out,
    row_length,
    n_groups,
    stride_row,
    threshold,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    UPCAST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Up to BLOCK_ROWS rows: each has its own mask, and weights are read where any row keeps the channel.

    Products are of x's dtype, or float32 if UPCAST, as rounded weights need it: half precision would round them again.
    """
    split = tl.program_id(1)
    each: tl.constexpr = 2 if BITS == 4 else 1
    width: tl.constexpr = BLOCK_OUT // each
    rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_there = rows < n_rows
    places = tl.program_id(0) * width + tl.arange(0, width)
    there = places < row_length
    lanes = tl.arange(0, BLOCK_IN)
    first = split * STEPS * BLOCK_IN
    low = tl.zeros((BLOCK_ROWS, width), dtype=tl.float32)
    high = tl.zeros((BLOCK_ROWS, width), dtype=tl.float32)
    tile = lanes[:, None] * row_length + places[None, :]
    x_rows = rows.to(tl.int64) * stride_row
    if HAS_DENSE:
        everything = tl.load(dense_ptr + rows, mask=row_there, other=0) != 0
    for step in range(STEPS):
        start = first + step * BLOCK_IN
        channels = start + lanes
        keep = row_there[:, None] & (channels < d_in)[None, :]
        x = tl.load(x_ptr + x_rows[:, None] + channels[None, :], mask=keep, other=0.0)
        if not KEEP_ALL:
            norms = tl.load(norms_ptr + channels, mask=channels < d_in, other=0.0)
            scored = tl.abs(x.to(tl.float32)) * norms[None, :] >= threshold
            if HAS_DENSE:
                scored = scored | everything[:, None]
            keep = keep & scored
        x_kept = tl.where(keep, x, tl.zeros_like(x))
        wanted = tl.max(keep.to(tl.int32), axis=0) > 0
        weight = tl.load(
            weight_ptr + start.to(tl.int64) * row_length + tile, mask=wanted[:, None] & there[None, :], other=0
        )
        if UPCAST:
            x_kept = x_kept.to(tl.float32)
        if BITS >= 16:
            if UPCAST:
                weight = weight.to(tl.float32)
            low = tl.dot(x_kept, weight, low, input_precision="ieee")
        else:
            group = tl.program_id(0) * BLOCK_OUT // GROUP
            scale, offset = _load_scales(scales_ptr, channels, n_groups, group, wanted)
            if BITS == 8:
                low = tl.dot(x_kept, weight.to(tl.float32) * scale + offset, low, input_precision="ieee")
            else:
                low = tl.dot(x_kept, (weight & 15).to(tl.float32) * scale + offset, low, input_precision="ieee")
                high = tl.dot(x_kept, (weight >> 4).to(tl.float32) * scale + offset, high, input_precision="ieee")
    out = places * each
    place = ((split.to(tl.int64) * n_rows + rows) * d_out)[:, None] + out[None, :]
    tl.store(partial_ptr + place, low, mask=row_there[:, None] & (out < d_out)[None, :])
    if BITS == 4:
        tl.store(partial_ptr + place + 1, high, mask=row_there[:, None] & (out + 1 < d_out)[None, :])


@triton.jit
def reduce_kernel(
    partial_ptr,  # [splits, rows, d_out] float32
    bias_ptr,  # [d_out], read only if HAS_BIAS
    scale_ptr,  # [d_out] float32, read only if CORRECTED
    constant_ptr,  # [d_out] float32, read only if CORRECTED
    dense_ptr,  # [rows] uint8, read only if HAS_DENSE
    y_ptr,  # [rows, d_out] contiguous
    n_rows,
    d_out,
    HAS_BIAS: tl.constexpr,
    CORRECTED: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums in order of split, add the bias or correct them, and round once to y's dtype."""
    row = tl.program_id(0)  # the first axis has no limit of 65,535
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = out < d_out
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        place = (row + split * n_rows).to(tl.int64) * d_out
        total += tl.load(partial_ptr + place + out, mask=there, other=0.0)
    if CORRECTED:
        scale = tl.load(scale_ptr + out, mask=there, other=1.0)
        corrected = total * scale + tl.load(constant_ptr + out, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=there, other=0.0).to(tl.float32)
    if CORRECTED:
        if HAS_DENSE:
            dense = tl.load(dense_ptr + row) != 0
            total = tl.where(dense, total, corrected)
        else:
            total = corrected
    tl.store(y_ptr + row.to(tl.int64) * d_out + out, total.to(y_ptr.dtype.element_ty), mask=there)
