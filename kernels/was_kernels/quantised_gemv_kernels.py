"""Triton bodies of the sparse GEMV on rounded weights; :mod:`was_kernels.quantised_gemv` holds the formula and the op.

As :mod:`was_kernels.sparse_gemv_kernels`, but for the weight's loads: bytes of one value at 8 bits and of two at 4, the
first in the low half, and a scale and an offset for each channel and tile of outputs, which lies within one group.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import triton
import triton.language as tl


@triton.jit
def quantised_row_kernel(
    x_ptr,  # [d_in]
    packed_ptr,  # [d_in, row_bytes] uint8 contiguous
    scales_ptr,  # [d_in, groups, 2] float16 contiguous
    norms_ptr,  # [d_in] float32
    dense_ptr,  # [1] uint8, read only if HAS_DENSE
    partial_ptr,  # [splits, 1, d_out] float32
    d_in,
    d_out,
    row_bytes,
    groups,
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
    each: tl.constexpr = 8 // BITS
    n_bytes: tl.constexpr = BLOCK_OUT // each
    places = tl.program_id(0) * n_bytes + tl.arange(0, n_bytes)
    there = places < row_bytes
    group = tl.program_id(0) * BLOCK_OUT // GROUP
    lanes = tl.arange(0, BLOCK_IN)
    first = split * STEPS * BLOCK_IN
    low = tl.zeros((BLOCK_IN, n_bytes), dtype=tl.float32)
    high = tl.zeros((BLOCK_IN, n_bytes), dtype=tl.float32)
    tile = lanes[:, None] * row_bytes + places[None, :]
    if HAS_DENSE:
        everything = tl.load(dense_ptr + lanes * 0) != 0
    for step in range(STEPS):
        start = first + step * BLOCK_IN
        channels = start + lanes
        keep = channels < d_in
        x = tl.load(x_ptr + channels, mask=keep, other=0.0).to(tl.float32)
        if not KEEP_ALL:
            norms = tl.load(norms_ptr + channels, mask=keep, other=0.0)
            scored = tl.abs(x) * norms >= threshold
            if HAS_DENSE:
                scored = scored | everything
            keep = keep & scored
        x_kept = tl.where(keep, x, 0.0)
        # The start in int64: a language model's head may exceed 2**31 bytes.
        packed = tl.load(
            packed_ptr + start.to(tl.int64) * row_bytes + tile,
            mask=keep[:, None] & there[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        pair = scales_ptr + (channels.to(tl.int64) * groups + group) * 2
        scale = tl.load(pair, mask=keep, other=0.0).to(tl.float32)
        offset = tl.load(pair + 1, mask=keep, other=0.0).to(tl.float32)
        if BITS == 8:
            low += (packed.to(tl.float32) * scale[:, None] + offset[:, None]) * x_kept[:, None]
        else:
            low += ((packed & 15).to(tl.float32) * scale[:, None] + offset[:, None]) * x_kept[:, None]
            high += ((packed >> 4).to(tl.float32) * scale[:, None] + offset[:, None]) * x_kept[:, None]
    out = partial_ptr + split * d_out + places * each
    tl.store(out, tl.sum(low, axis=0), mask=places * each < d_out)
    if BITS == 4:
        tl.store(out + 1, tl.sum(high, axis=0), mask=places * each + 1 < d_out)


@triton.jit
def quantised_batch_kernel(
    x_ptr,  # [rows, d_in], last stride 1
    packed_ptr,  # [d_in, row_bytes] uint8 contiguous
    scales_ptr,  # [d_in, groups, 2] float16 contiguous
    norms_ptr,  # [d_in] float32
    dense_ptr,  # [rows] uint8, read only if HAS_DENSE
    partial_ptr,  # [splits, rows, d_out] float32
    n_rows,
    d_in,
    d_out,
    row_bytes,
    groups,
    stride_row,
    threshold,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP_ALL: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Up to BLOCK_ROWS rows, each masked by itself. Products in float32: in half precision weights would be rounded."""
    split = tl.program_id(1)
    each: tl.constexpr = 8 // BITS
    n_bytes: tl.constexpr = BLOCK_OUT // each
    rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_there = rows < n_rows
    places = tl.program_id(0) * n_bytes + tl.arange(0, n_bytes)
    there = places < row_bytes
    group = tl.program_id(0) * BLOCK_OUT // GROUP
    lanes = tl.arange(0, BLOCK_IN)
    first = split * STEPS * BLOCK_IN
    low = tl.zeros((BLOCK_ROWS, n_bytes), dtype=tl.float32)
    high = tl.zeros((BLOCK_ROWS, n_bytes), dtype=tl.float32)
    tile = lanes[:, None] * row_bytes + places[None, :]
    x_rows = rows.to(tl.int64) * stride_row
    if HAS_DENSE:
        everything = tl.load(dense_ptr + rows, mask=row_there, other=0) != 0
    for step in range(STEPS):
        start = first + step * BLOCK_IN
        channels = start + lanes
        keep = row_there[:, None] & (channels < d_in)[None, :]
        x = tl.load(x_ptr + x_rows[:, None] + channels[None, :], mask=keep, other=0.0).to(tl.float32)
        if not KEEP_ALL:
            norms = tl.load(norms_ptr + channels, mask=channels < d_in, other=0.0)
            scored = tl.abs(x) * norms[None, :] >= threshold
            if HAS_DENSE:
                scored = scored | everything[:, None]
            keep = keep & scored
        x_kept = tl.where(keep, x, 0.0)
        wanted = tl.max(keep.to(tl.int32), axis=0) > 0
        packed = tl.load(
            packed_ptr + start.to(tl.int64) * row_bytes + tile, mask=wanted[:, None] & there[None, :], other=0
        )
        pair = scales_ptr + (channels.to(tl.int64) * groups + group) * 2
        scale = tl.load(pair, mask=wanted, other=0.0).to(tl.float32)[:, None]
        offset = tl.load(pair + 1, mask=wanted, other=0.0).to(tl.float32)[:, None]
        if BITS == 8:
            low = tl.dot(x_kept, packed.to(tl.float32) * scale + offset, low, input_precision="ieee")
        else:
            low = tl.dot(x_kept, (packed & 15).to(tl.float32) * scale + offset, low, input_precision="ieee")
            high = tl.dot(x_kept, (packed >> 4).to(tl.float32) * scale + offset, high, input_precision="ieee")
    out = places * each
    place = ((split.to(tl.int64) * n_rows + rows) * d_out)[:, None] + out[None, :]
    tl.store(partial_ptr + place, low, mask=row_there[:, None] & (out < d_out)[None, :])
    if BITS == 4:
        tl.store(partial_ptr + place + 1, high, mask=row_there[:, None] & (out + 1 < d_out)[None, :])
