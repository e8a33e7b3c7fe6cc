"""Sparse GEMV on weights of 8 or 4 bits: ``y[b] = W[:, kept(b)] @ x[b, kept(b)] + bias``, W = scale * q + offset.

As :mod:`was_kernels.sparse_gemv`, with the weight as ``was_search.rounding.quantise`` makes it: an input channel's
outputs lie one after another in memory, with a scale and an offset for each group of them. A dropped channel costs
neither. Weights are written out in registers, in float32, and so are sums.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from was_kernels.launch import DTYPES, on_device_of, processors, runs
from was_kernels.quantised_gemv_kernels import quantised_batch_kernel, quantised_row_kernel
from was_kernels.quantised_weight import QuantisedWeight
from was_kernels.reference import quantised_gemv_reference
from was_kernels.sparse_gemv import TILE_ROWS, Tiling, choose_tiling
from was_kernels.sparse_gemv_kernels import reduce_kernel

_BLOCK_REDUCE = 256


def tiling(rows: int, weight: QuantisedWeight, n_processors: int) -> Tiling:
    """As for floats, with tiles that lie within one group and, as products are float32, half the channels a step."""
    d_in = weight.packed.shape[0]
    cut = choose_tiling(rows, d_in, weight.width, 4, n_processors)
    return replace(cut, block_out=math.gcd(cut.block_out, weight.group))


def _launch(
    x: Tensor,
    weight: QuantisedWeight,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None,
    dense: Tensor | None,
    cut: Tiling | None = None,
) -> Tensor:
    _require(x, weight, norms, bias, dense)
    if not runs(quantised_row_kernel, x) or x.dtype not in DTYPES:
        return quantised_gemv_reference(
            x, weight.packed, weight.scales, weight.bits, weight.group, weight.width, norms, threshold, bias, dense
        )
    rows, d_in, d_out = x.shape[0], x.shape[1], weight.width
    y = torch.empty((rows, d_out), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if x.stride(-1) != 1:
        x = x.contiguous()
    cut = cut or tiling(rows, weight, processors(x))
    partial = torch.empty((cut.splits, rows, d_out), dtype=torch.float32, device=x.device)
    flags = norms if dense is None else dense.view(torch.uint8)
    keep_all = threshold <= 0.0
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
    sizes = (d_in, d_out, weight.packed.shape[1], weight.scales.shape[1])
    grid = (-(-d_out // cut.block_out), cut.splits, -(-rows // TILE_ROWS))
    given = (x, weight.packed, weight.scales, norms, flags, partial)
    with on_device_of(x):
        if rows == 1:
            quantised_row_kernel[grid](*given, *sizes, threshold, **options)
        else:
            quantised_batch_kernel[grid](*given, rows, *sizes, x.stride(0), threshold, BLOCK_ROWS=TILE_ROWS, **options)
        reduce_kernel[(rows, -(-d_out // _BLOCK_REDUCE))](
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


def _require(x: Tensor, weight: QuantisedWeight, norms: Tensor, bias: Tensor | None, dense: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: [B, d_in] needed, got {list(x.shape)}")
    rows, d_in = x.shape
    weight.require(d_in)
    if norms.shape != (d_in,) or norms.dtype != torch.float32 or not norms.is_contiguous():
        raise ValueError(f"norms: contiguous float32 [{d_in}] needed, got {norms.dtype} {list(norms.shape)}")
    if bias is not None and (bias.shape != (weight.width,) or not bias.is_contiguous()):
        raise ValueError(f"bias: contiguous [{weight.width}] needed, got {list(bias.shape)}")
    if dense is not None and (dense.shape != (rows,) or dense.dtype != torch.bool or not dense.is_contiguous()):
        raise ValueError(f"dense: contiguous bool [{rows}] needed, got {dense.dtype} {list(dense.shape)}")


@torch.library.custom_op(
    "was::quantised_gemv",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor packed, Tensor scales, int bits, int group, int width, Tensor norms, float threshold, "
        "Tensor? bias=None, Tensor? dense=None) -> Tensor"
    ),
)
def _quantised_gemv_op(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    width: int,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    return _launch(x, QuantisedWeight(packed, scales, bits, group, width), norms, threshold, bias, dense)


@_quantised_gemv_op.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    width: int,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], width))


def quantised_gemv(
    x: Tensor,
    weight: QuantisedWeight,
    norms: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """The masks and sums of :func:`was_kernels.sparse_gemv.sparse_gemv` on a rounded weight; no gradient flows.

    Args:
        x: [B, d_in], fp16, bf16 or fp32.
        weight: of d_in channels.
        norms: [d_in] float32.
        threshold: in the unit of ``abs(x) * norms``.
        bias: [width] or None.
        dense: bool [B] or None: rows that keep every channel.

    Returns:
        [B, width] in x's dtype.

    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.was.quantised_gemv(
            x, weight.packed, weight.scales, weight.bits, weight.group, weight.width, norms, threshold, bias, dense
        )
        return y
    return _launch(x, weight, norms, threshold, bias, dense)
