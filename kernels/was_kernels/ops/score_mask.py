"""Fused score and mask: ``y_j = x_j if abs(x_j) * norm_j >= threshold else 0``.

One read and one write of x where plain torch makes five passes. The semantics are those of
``was_search.masks.score.masked``, the reference ``MaskOp``, bit for bit.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

import torch
import triton
import triton.language as tl
from torch import Tensor

from was_kernels.ops.reference import score_mask_reference
from was_kernels.ops.triton_launch import DTYPES, on_device_of, runs

_BLOCK_ROWS = 4
_BLOCK_COLUMNS = 1024


@triton.jit
def _score_mask_kernel(
    x_ptr,  # [sequences, positions, d], last stride 1
    norms_ptr,  # [d] float32
    dense_ptr,  # [sequences * positions] uint8, read only if HAS_DENSE
    y_ptr,  # [sequences, positions, d] contiguous
    n_rows,
    positions,
    d,
    stride_sequence,
    stride_position,
    threshold,
    HAS_DENSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_there = rows < n_rows
    column_there = columns < d
    there = row_there[:, None] & column_there[None, :]
    # Row offsets in int64: an evaluation batch may hold more than 2**31 elements.
    sequence = (rows // positions).to(tl.int64)
    position = (rows % positions).to(tl.int64)
    x_rows = sequence * stride_sequence + position * stride_position
    norms = tl.load(norms_ptr + columns, mask=column_there, other=0.0)
    x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=there, other=0.0)
    keep = tl.abs(x.to(tl.float32)) * norms[None, :] >= threshold
    if HAS_DENSE:
        dense = tl.load(dense_ptr + rows, mask=row_there, other=0)
        keep = keep | (dense[:, None] != 0)
    y = tl.where(keep, x, tl.zeros_like(x))
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * d + columns[None, :], y, mask=there)


def _launch(x: Tensor, norms: Tensor, threshold: float, dense: Tensor | None) -> Tensor:
    _require(x, norms, dense)
    if not runs(_score_mask_kernel, x) or x.dtype not in DTYPES:
        return score_mask_reference(x, norms, threshold, dense)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    d = x.shape[-1]
    # A slice of positions (the part after the dense prefix) is read in place; rarer layouts are copied.
    source = x if x.dim() == 3 and x.stride(-1) == 1 else x.reshape(1, -1, d).contiguous()
    n_rows = x.numel() // d
    grid = (triton.cdiv(n_rows, _BLOCK_ROWS), triton.cdiv(d, _BLOCK_COLUMNS))
    with on_device_of(x):
        _score_mask_kernel[grid](
            source,
            norms,
            norms if dense is None else dense.view(torch.uint8),
            y,
            n_rows,
            source.shape[1],
            d,
            source.stride(0),
            source.stride(1),
            threshold,
            HAS_DENSE=dense is not None,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            num_warps=4,
        )
    return y


def _require(x: Tensor, norms: Tensor, dense: Tensor | None) -> None:
    d = x.shape[-1]
    if norms.shape != (d,) or norms.dtype != torch.float32 or not norms.is_contiguous():
        raise ValueError(f"norms: contiguous float32 [{d}] needed, got {norms.dtype} {list(norms.shape)}")
    if dense is not None and (dense.numel() * d != x.numel() or dense.dtype != torch.bool):
        raise ValueError(f"dense: one bool per row of x needed, got {dense.dtype} {list(dense.shape)}")
    if dense is not None and not dense.is_contiguous():
        raise ValueError("dense: must be contiguous")


@torch.library.custom_op(
    "was::score_mask",
    mutates_args=(),
    schema="(Tensor x, Tensor norms, float threshold, Tensor? dense=None) -> Tensor",
)
def _score_mask_op(x: Tensor, norms: Tensor, threshold: float, dense: Tensor | None = None) -> Tensor:
    return _launch(x, norms, threshold, dense) if threshold > 0.0 else x.clone()


@_score_mask_op.register_fake
def _(x: Tensor, norms: Tensor, threshold: float, dense: Tensor | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def score_mask(x: Tensor, norms: Tensor, threshold: float, dense: Tensor | None = None) -> Tensor:
    """x with the channels whose score is under ``threshold`` set to zero; no gradient flows through it.

    Formula and corner cases (ties are kept, a NaN score is dropped, a threshold of zero or less returns x
    itself) are those of ``was_search.masks.score.masked``. On CPU without the interpreter, and for dtypes other
    than fp16, bf16 and fp32, the plain reference runs.

    Args:
        x: [..., d]; [batch, positions, d] with unit last stride is read in place, others are copied first.
        norms: [d] float32, on x's device.
        threshold: in the unit of ``abs(x) * norms``; compared in float32.
        dense: bool, one flag per row of x, row-major: rows that keep every channel (the dense prefix).

    Raises:
        ValueError: norms or dense of another shape or dtype.
    """
    if threshold <= 0.0:
        return x
    if torch.compiler.is_compiling():
        masked: Tensor = torch.ops.was.score_mask(x, norms, threshold, dense)
        return masked
    return _launch(x, norms, threshold, dense)  # the registered op adds microseconds of dispatch to each call
