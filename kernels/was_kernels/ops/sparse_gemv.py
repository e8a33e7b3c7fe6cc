"""Sparse GEMV with the norm folded into the score: ``y[b] = W[:, kept(b)] @ x[b, kept(b)] + bias``, or corrected.

The weight is held column-major, as stored or rounded (:class:`was_kernels.ops.column_weight.ColumnWeight`), so that a
dropped channel is a whole row of memory that is never read, and neither are its scale and offset. TEAL
(arXiv:2408.14690) folds magnitude thresholding into its GEMV; here the score is ``abs(x_j) * norm_j``, and every row of
a batch has its own mask: a channel's weights are skipped where all rows of a tile drop it. Rounded weights are written
out in registers, in float32.

Programs tile outputs x a share of d_in. Partial sums go to a float32 workspace [splits, B, d_out] that a
second kernel adds up in a fixed order: no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.correction import Correction
from was_kernels.ops.reference import sparse_gemv_reference
from was_kernels.ops.sparse_gemv_kernels import batch_kernel, reduce_kernel, row_kernel
from was_kernels.ops.triton_launch import DTYPES, interpreted, on_device_of, processors, runs

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


def choose_tiling(rows: int, d_in: int, d_out: int, bits: int, group: int, n_processors: int) -> Tiling:
    """Cut [d_in, d_out] so that all processors have work: ``splits`` fills them, as far as d_in has steps.

    128 outputs make 256 contiguous bytes of half precision: sixteen lanes of 16-byte loads. Batches whose products are
    of full precision (weights of 32 bits, and rounded ones) take half the channels a step, as a step of 64 spills
    registers. Tiles of rounded weights lie within one group.
    """
    block_out, block_in = (128, 32) if rows == 1 else (64, 64 if bits == 16 else 32)
    tiles = _cdiv(d_out, block_out) * _cdiv(rows, TILE_ROWS)
    total_steps = _cdiv(d_in, block_in)
    wanted = max(1, min(total_steps, _PROGRAMS_PER_PROCESSOR * n_processors // tiles))
    steps = _cdiv(total_steps, wanted)
    block_out = math.gcd(block_out, group) if bits < 16 else block_out
    return Tiling(block_out, block_in, steps, _cdiv(total_steps, steps), warps=4)


def _launch(x: Tensor, sparse: SparseMap, dense: Tensor | None, tiling: Tiling | None = None) -> Tensor:
    _require(x, sparse, dense)
    if not runs(row_kernel, x) or x.dtype not in DTYPES:
        return sparse_gemv_reference(x, sparse, dense)
    weight, norms, bias, correction = sparse.weight, sparse.norms, sparse.bias, sparse.correction
    (rows, d_in), d_out = x.shape, weight.width
    y = torch.empty((rows, d_out), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if x.stride(-1) != 1:
        x = x.contiguous()
    cut = tiling or choose_tiling(rows, d_in, d_out, weight.bits, weight.group, processors(x))
    partial = torch.empty((cut.splits, rows, d_out), dtype=torch.float32, device=x.device)
    flags = norms if dense is None else dense.view(torch.uint8)
    keep_all = sparse.threshold <= 0.0
    options = {
        "BITS": weight.bits,
        "GROUP": weight.group,
        "KEEP_ALL": keep_all,
        "HAS_DENSE": dense is not None and not keep_all,
        "STEPS": cut.steps,
        "BLOCK_OUT": cut.block_out,
        "BLOCK_IN": cut.block_in,
        "num_warps": cut.warps,
        "num_stages": 1,
    }
    scales, n_groups = (norms, 1) if weight.scales is None else (weight.scales, weight.scales.shape[1])
    given = (x, weight.columns, scales, norms, flags, partial)
    sizes = (d_in, d_out, weight.columns.shape[1], n_groups)
    grid = (_cdiv(d_out, cut.block_out), cut.splits, _cdiv(rows, TILE_ROWS))
    with on_device_of(x):
        if rows == 1:
            row_kernel[grid](*given, *sizes, sparse.threshold, **options)
        else:
            # The interpreter has no bfloat16 product.
            upcast = weight.scales is not None or (interpreted(batch_kernel) and x.dtype == torch.bfloat16)
            batch = (rows, *sizes, x.stride(0), sparse.threshold)
            batch_kernel[grid](*given, *batch, UPCAST=upcast, BLOCK_ROWS=TILE_ROWS, **options)
        reduce_kernel[(rows, _cdiv(d_out, _BLOCK_REDUCE))](
            partial,
            norms if bias is None else bias,
            norms if correction is None else correction.scale,
            norms if correction is None else correction.constant,
            flags,
            y,
            rows,
            d_out,
            HAS_BIAS=bias is not None,
            CORRECTED=correction is not None,
            HAS_DENSE=correction is not None and dense is not None,
            SPLITS=cut.splits,
            BLOCK=_BLOCK_REDUCE,
            num_warps=4,
        )
    return y


def _require(x: Tensor, sparse: SparseMap, dense: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: [B, d_in] needed, got {list(x.shape)}")
    rows, d_in = x.shape
    sparse.require(d_in, x.dtype)
    if not sparse.weight.columns.is_contiguous():
        raise ValueError(f"weight: must be contiguous [d_in, width], got strides {sparse.weight.columns.stride()}")
    if dense is not None and (dense.shape != (rows,) or dense.dtype != torch.bool or not dense.is_contiguous()):
        raise ValueError(f"dense: contiguous bool [{rows}] needed, got {dense.dtype} {list(dense.shape)}")


@torch.library.custom_op(
    "was::sparse_gemv",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor columns, Tensor? scales, int bits, int group, int width, Tensor norms, float threshold, "
        "Tensor? bias=None, Tensor? dense=None, Tensor? scale=None, Tensor? constant=None) -> Tensor"
    ),
)
def _sparse_gemv_op(
    x: Tensor,
    columns: Tensor,
    scales: Tensor | None,
    bits: int,
    group: int,
    width: int,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
    scale: Tensor | None = None,
    constant: Tensor | None = None,
) -> Tensor:
    """:func:`sparse_gemv` with its map laid out flat, as an op's schema must be."""
    correction = None if scale is None or constant is None else Correction(scale, constant)
    weight = ColumnWeight(columns, scales, bits, group, width)
    return _launch(x, SparseMap(weight, norms, threshold, bias, correction), dense)


@_sparse_gemv_op.register_fake
def _(
    x: Tensor, columns: Tensor, scales: Tensor | None, bits: int, group: int, width: int, *_: Any, **__: Any
) -> Tensor:
    return x.new_empty((x.shape[0], width))


def sparse_gemv(x: Tensor, sparse: SparseMap, dense: Tensor | None = None) -> Tensor:
    """``y[b] = W[:, kept(b)] @ x[b, kept(b)] + bias``, or corrected, for any batch; no gradient flows through it.

    Each row keeps its own channels. Weights of a channel that every row of a tile of 16 drops are not read. Sums are
    float32 in a fixed order: the same inputs give the same bits on the same device. On CPU without the interpreter the
    plain reference runs.

    Args:
        x: [B, d_in], fp16, bf16 or fp32.
        sparse: the map; its weight is contiguous, in x's dtype or rounded.
        dense: bool [B] or None: rows that keep every channel and are not corrected (the dense prefix); read on the
            device, no sync.

    Returns:
        [B, width] in x's dtype.

    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    """
    if torch.compiler.is_compiling():
        w, of = sparse.weight, sparse.correction
        y: Tensor = torch.ops.was.sparse_gemv(
            *(x, w.columns, w.scales, w.bits, w.group, w.width, sparse.norms, sparse.threshold, sparse.bias, dense),
            *(() if of is None else (of.scale, of.constant)),
        )
        return y
    return _launch(x, sparse, dense)
