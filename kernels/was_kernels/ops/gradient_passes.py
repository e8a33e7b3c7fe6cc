"""Fused backward work of the passes that price sparsity and take slopes, and the counting of scores.

Each does in one read of a projection's input and gradient what plain torch does in a dozen passes over it:
``was_search.masks.gradient_terms.price_terms``, ``was_search.masks.gradient_terms.slope_terms`` and
``was_search.masks.histogram.bin_counts`` are the references. Sums are formed in float32 inside a tile and in float64
over tiles, in a fixed order; counts are integers: two runs give the same bits.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_kernels.ops.triton_launch import on_device_of

N_BINS = 1 << 15
"""Bins of a histogram of scores: the upper 16 bits of a float32 without its sign."""

_COPIES = 16
"""Number of copies of the histogram, as many scores fall into few bins and atomic additions to one bin queue up."""

_ROWS = 4
_COLUMNS = 1024
_BINS_BLOCK = 4096
_PRICE_COLUMNS = 128


@triton.jit
def _bins(scores):
    return (scores.to(tl.int32, bitcast=True) >> 16) & 0x7FFF


@triton.jit
def _count_kernel(scores_ptr, counts_ptr, n, N: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    bins = _bins(tl.load(scores_ptr + at, mask=there, other=0.0))
    tl.atomic_add(counts_ptr + (program % COPIES) * N + bins, 1, mask=there, sem="relaxed")


@triton.jit
def _slope_kernel(
    x_ptr,  # [n_rows, d] contiguous
    gradient_ptr,  # like x
    norms_ptr,  # [d] float32
    limits_ptr,  # [3] float32: threshold, low, high
    passed_ptr,  # like x
    changes_ptr,  # [programs] float32
    counts_ptr,  # [COPIES, N] int32, zeros
    n_rows,
    d,
    positions,
    prefix,
    width,
    N: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (rows < n_rows)[:, None] & (columns < d)[None, :]
    body = there & (rows % positions >= prefix)[:, None]
    at = rows.to(tl.int64)[:, None] * d + columns[None, :]
    norms = tl.load(norms_ptr + columns, mask=columns < d, other=0.0)
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    gradient = tl.load(gradient_ptr + at, mask=there, other=0.0)
    wide = gradient.to(tl.float32)
    threshold = tl.load(limits_ptr)
    low = tl.load(limits_ptr + 1)
    high = tl.load(limits_ptr + 2)

    scores = tl.abs(x) * norms[None, :]
    inside = body & (scores >= low) & (scores < high)
    tl.store(changes_ptr + program, -tl.sum(tl.sum(tl.where(inside, wide * x, 0.0), axis=1), axis=0))
    reach = width * threshold
    near = tl.abs(scores - threshold) < reach
    factor = tl.where(scores >= threshold, 1.0, 0.0)
    factor += tl.where(near, scores / tl.maximum(2.0 * reach, 1e-30), 0.0)
    passed = tl.where(body, (wide * factor).to(gradient.dtype), gradient)
    tl.store(passed_ptr + at, passed, mask=there)
    tl.atomic_add(counts_ptr + (program % COPIES) * N + _bins(scores), 1, mask=body, sem="relaxed")


@triton.jit
def _price_kernel(
    x_ptr,  # [n_rows, d] contiguous
    gradient_ptr,  # like x
    norms_ptr,  # [d] float32
    bounds_ptr,  # [levels] float32
    squares_ptr,  # [bodies, LEVELS] float32
    d,
    levels,
    positions,
    prefix,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    body = tl.program_id(0)
    inside = positions - prefix
    row = (body // inside).to(tl.int64) * positions + prefix + body % inside
    index = tl.arange(0, LEVELS)
    bounds = tl.load(bounds_ptr + index, mask=index < levels, other=0.0)
    change = tl.zeros((LEVELS,), tl.float32)
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        there = columns < d
        x = tl.load(x_ptr + row * d + columns, mask=there, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + row * d + columns, mask=there, other=0.0).to(tl.float32)
        scores = tl.abs(x) * tl.load(norms_ptr + columns, mask=there, other=0.0)
        dropped = scores[None, :] < bounds[:, None]
        change += tl.sum(tl.where(dropped, (gradient * x)[None, :], 0.0), axis=1)
    tl.store(squares_ptr + body.to(tl.int64) * LEVELS + index, 0.5 * change * change)


def count_scores(scores: Tensor) -> Tensor:
    """Counts of ``scores`` (float32, >= 0, any shape) in the fixed bins, int64 [32768]; asks the host for nothing."""
    scores = scores.contiguous()
    counts = torch.zeros((_COPIES, N_BINS), dtype=torch.int32, device=scores.device)
    if scores.numel():
        with on_device_of(scores):
            _count_kernel[(triton.cdiv(scores.numel(), _BINS_BLOCK),)](
                scores, counts, scores.numel(), N=N_BINS, COPIES=_COPIES, BLOCK=_BINS_BLOCK, num_warps=8
            )
    return counts.sum(0, dtype=torch.int64)


def slope_terms(
    x: Tensor, gradient: Tensor, norms: Tensor, limits: Tensor, width: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask's backward, fused; see ``was_search.masks.gradient_terms.slope_terms``.

    Args:
        x: [sequences, positions, d], the input before masking.
        gradient: like x, of the loss at the masked input.
        norms: [d] float32.
        limits: float32 [3]: the threshold, and the window's scores.
        width: of the band around the threshold.
        prefix: positions that are never masked.

    Returns:
        The gradient at x, in the gradient's dtype; the loss's change over the window, float64 scalar; counts of the
        scores after the prefix, int64 [32768].
    """
    x, gradient = x.contiguous(), gradient.contiguous()
    d, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    grid = (triton.cdiv(n_rows, _ROWS), triton.cdiv(d, _COLUMNS))
    passed = torch.empty_like(gradient)
    changes = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=x.device)
    counts = torch.zeros((_COPIES, N_BINS), dtype=torch.int32, device=x.device)
    with on_device_of(x):
        _slope_kernel[grid](
            x,
            gradient,
            norms,
            limits,
            passed,
            changes,
            counts,
            n_rows,
            d,
            x.shape[1],
            prefix,
            width,
            N=N_BINS,
            COPIES=_COPIES,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return passed, changes.sum(dtype=torch.float64), counts.sum(0, dtype=torch.int64)


def price_terms(x: Tensor, gradient: Tensor, norms: Tensor, bounds: Tensor, prefix: int) -> Tensor:
    """Prices of one input at every level, fused; see ``was_search.masks.gradient_terms.price_terms``.

    Args:
        x: [sequences, positions, d].
        gradient: like x.
        norms: [d] float32.
        bounds: float32 [G], the levels' thresholds, rising.
        prefix: positions that are never masked.

    Returns:
        Prices summed over tokens, float64 [G].
    """
    x, gradient = x.contiguous(), gradient.contiguous()
    bodies, levels = x.shape[0] * (x.shape[1] - prefix), triton.next_power_of_2(len(bounds))
    squares = torch.empty((bodies, levels), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _price_kernel[(bodies,)](
            x,
            gradient,
            norms,
            bounds,
            squares,
            x.shape[-1],
            len(bounds),
            x.shape[1],
            prefix,
            LEVELS=levels,
            COLUMNS=_PRICE_COLUMNS,
            num_warps=4,
        )
    return squares[:, : len(bounds)].sum(0, dtype=torch.float64)
