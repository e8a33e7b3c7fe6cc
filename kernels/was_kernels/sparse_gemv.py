"""Sparse GEMV with the norm folded into the score: ``y[b] = W[:, kept(b)] @ x[b, kept(b)] + bias``.

The weight is held column-major (``weight_t`` [d_in, d_out] contiguous), so that a dropped channel is a whole
row of memory that is never read. TEAL (arXiv:2408.14690) folds magnitude thresholding into its GEMV; here the
score is ``abs(x_j) * norm_j``, and every row of a batch has its own mask: a channel's weights are skipped
where all rows of a tile drop it.

Programs tile outputs x a share of d_in. Partial sums go to a float32 workspace [splits, B, d_out] that a
second kernel adds up in a fixed order: no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from was_kernels.launch import DTYPES, interpreted, on_device_of, processors, runs
from was_kernels.reference import sparse_gemv_reference
from was_kernels.sparse_gemv_kernels import batch_kernel, reduce_kernel, row_kernel

TILE_ROWS = 16
"""Batch rows of one tile: the least that tensor cores take. Larger batches read the weight once per tile."""

_BLOCK_REDUCE = 256
_PROGRAMS_PER_PROCESSOR = 6  # enough loads in flight to cover latency when most are predicated off


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: outputs and channels of a tile, tiles a program walks, programs along d_in."""

    block_out: int
    block_in: int
    steps: int
    splits: int
    warps: int


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def choose_tiling(rows: int, d_in: int, d_out: int, itemsize_bytes: int, n_processors: int) -> Tiling:
    """Cut [d_in, d_out] so that all processors have work: ``splits`` fills them, as far as d_in has steps.

    128 outputs make 256 contiguous bytes of half precision: sixteen lanes of 16-byte loads. Full-precision
    batches take half the channels a step, as a step of 64 spills registers.
    """
    block_out, block_in = (128, 32) if rows == 1 else (64, 64 if itemsize_bytes == 2 else 32)
    tiles = _cdiv(d_out, block_out) * _cdiv(rows, TILE_ROWS)
    total_steps = _cdiv(d_in, block_in)
    wanted = max(1, min(total_steps, _PROGRAMS_PER_PROCESSOR * n_processors // tiles))
    steps = _cdiv(total_steps, wanted)
    return Tiling(block_out, block_in, steps, _cdiv(total_steps, steps), warps=4)


def _launch(
    x: Tensor,
    weight_t: Tensor,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None,
    dense: Tensor | None,
    tiling: Tiling | None = None,
) -> Tensor:
    _require(x, weight_t, norms, bias, dense)
    if not runs(row_kernel, x) or x.dtype not in DTYPES:
        return sparse_gemv_reference(x, weight_t.t(), norms, threshold, bias, dense)
    rows, (d_in, d_out) = x.shape[0], weight_t.shape
    y = torch.empty((rows, d_out), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if x.stride(-1) != 1:
        x = x.contiguous()
    cut = tiling or choose_tiling(rows, d_in, d_out, x.element_size(), processors(x))
    partial = torch.empty((cut.splits, rows, d_out), dtype=torch.float32, device=x.device)
    flags = norms if dense is None else dense.view(torch.uint8)
    keep_all = threshold <= 0.0
    options = {"KEEP_ALL": keep_all, "HAS_DENSE": dense is not None and not keep_all, "STEPS": cut.steps}
    blocks = {"BLOCK_OUT": cut.block_out, "BLOCK_IN": cut.block_in, "num_warps": cut.warps, "num_stages": 1}
    grid = (_cdiv(d_out, cut.block_out), cut.splits, _cdiv(rows, TILE_ROWS))
    with on_device_of(x):
        if rows == 1:
            row_kernel[grid](x, weight_t, norms, flags, partial, d_in, d_out, threshold, **options, **blocks)
        else:
            batch_kernel[grid](
                x,
                weight_t,
                norms,
                flags,
                partial,
                rows,
                d_in,
                d_out,
                x.stride(0),
                threshold,
                UPCAST=interpreted(batch_kernel) and x.dtype == torch.bfloat16,
                BLOCK_ROWS=TILE_ROWS,
                **options,
                **blocks,
            )
        reduce_kernel[(rows, _cdiv(d_out, _BLOCK_REDUCE))](
            partial,
            norms if bias is None else bias,
            y,
            rows,
            d_out,
            HAS_BIAS=bias is not None,
            SPLITS=cut.splits,
            BLOCK=_BLOCK_REDUCE,
            num_warps=4,
        )
    return y


def _require(x: Tensor, weight_t: Tensor, norms: Tensor, bias: Tensor | None, dense: Tensor | None) -> None:
    if x.dim() != 2 or weight_t.dim() != 2 or x.shape[1] != weight_t.shape[0]:
        raise ValueError(
            f"x: [B, d_in] and weight_t [d_in, d_out] needed, got {list(x.shape)} and {list(weight_t.shape)}"
        )
    d_in, d_out = weight_t.shape
    if not weight_t.is_contiguous():
        raise ValueError(f"weight_t: must be contiguous [d_in, d_out], got strides {weight_t.stride()}")
    if weight_t.dtype != x.dtype:
        raise ValueError(f"weight_t: must have x's dtype {x.dtype}, got {weight_t.dtype}")
    if norms.shape != (d_in,) or norms.dtype != torch.float32 or not norms.is_contiguous():
        raise ValueError(f"norms: contiguous float32 [{d_in}] needed, got {norms.dtype} {list(norms.shape)}")
    if bias is not None and (bias.shape != (d_out,) or not bias.is_contiguous()):
        raise ValueError(f"bias: contiguous [{d_out}] needed, got {list(bias.shape)}")
    rows = x.shape[0]
    if dense is not None and (dense.shape != (rows,) or dense.dtype != torch.bool or not dense.is_contiguous()):
        raise ValueError(f"dense: contiguous bool [{rows}] needed, got {dense.dtype} {list(dense.shape)}")


@torch.library.custom_op(
    "was::sparse_gemv",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight_t, Tensor norms, float threshold, Tensor? bias=None, Tensor? dense=None) -> Tensor"
    ),
)
def _sparse_gemv_op(
    x: Tensor,
    weight_t: Tensor,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    return _launch(x, weight_t, norms, threshold, bias, dense)


@_sparse_gemv_op.register_fake
def _(
    x: Tensor,
    weight_t: Tensor,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]))


def sparse_gemv(
    x: Tensor,
    weight_t: Tensor,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """``y[b] = W[:, kept(b)] @ x[b, kept(b)] + bias`` for any batch; no gradient flows through it.

    Each row keeps the channels with ``abs(x) * norms >= threshold`` (float32; ties kept, NaN scores dropped;
    a threshold of zero or less keeps all). Weights of a channel that every row of a tile of 16 drops are not
    read. Sums are float32 in a fixed order: the same inputs give the same bits on the same device. On CPU
    without the interpreter the plain reference runs.

    Args:
        x: [B, d_in], fp16, bf16 or fp32.
        weight_t: [d_in, d_out] contiguous, x's dtype: the transposed weight of a linear map.
        norms: [d_in] float32.
        threshold: in the unit of ``abs(x) * norms``.
        bias: [d_out] or None.
        dense: bool [B] or None: rows that keep every channel (the dense prefix); read on the device, no sync.

    Returns:
        [B, d_out] in x's dtype.

    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.was.sparse_gemv(x, weight_t, norms, threshold, bias, dense)
        return y
    return _launch(x, weight_t, norms, threshold, bias, dense)
