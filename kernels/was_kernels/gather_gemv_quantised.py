"""The sparse projections of :mod:`was_kernels.gather_gemv` on weights of 8 or 4 bits, from the same CUDA source.

A lane's outputs lie within one group, so a channel's scale is multiplied into its input and its offset into one sum for
all of them: writing a weight out takes three instructions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.gather_gemv import MAX_ROWS_ROUNDED, launch_gather, require_group
from was_kernels.quantised_weight import QuantisedWeight
from was_kernels.reference import quantised_gemv_reference, rms_norm

COLUMNS = 32
"""A weight's outputs are a multiple of this: its rows then start at multiples of 16 bytes."""


def gather_gemv_quantised_reference(
    x: Tensor,
    weights: list[QuantisedWeight],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """What :func:`gather_gemv_quantised` computes, in plain torch."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, epsilon)
    outs = [
        quantised_gemv_reference(x, w.packed, w.scales, w.bits, w.group, w.width, own, threshold, bias, dense)
        for w, own, threshold, bias in zip(weights, norms, thresholds, biases, strict=True)
    ]
    y = F.silu(outs[0]) * outs[1] if gated else torch.cat(outs, dim=1)
    return y if residual is None else residual + y


@torch.library.custom_op(
    "was::gather_gemv_quantised",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] packed, Tensor[] scales, int bits, int group, int[] widths, Tensor[] norms, "
        "float[] thresholds, Tensor?[] biases, Tensor arrived, bool gated=False, Tensor? norm_weight=None, "
        "float epsilon=0.0, Tensor? residual=None, Tensor? dense=None, bool early=False) -> Tensor"
    ),
)
def _gather_gemv_quantised_op(
    x: Tensor,
    packed: list[Tensor],
    scales: list[Tensor],
    bits: int,
    group: int,
    widths: list[int],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    arrived: Tensor,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    weights = [QuantisedWeight(p, s, bits, group, width) for p, s, width in zip(packed, scales, widths, strict=True)]
    for weight in weights:
        weight.require(x.shape[-1])
        if weight.width % COLUMNS:
            raise ValueError(f"widths: a multiple of {COLUMNS} needed, got {weight.width}")
    shapes = [weight.packed for weight in weights]
    require_group(x, shapes, norms, thresholds, biases, gated, norm_weight, residual, MAX_ROWS_ROUNDED)
    if not x.is_cuda:
        return gather_gemv_quantised_reference(
            x, weights, norms, thresholds, biases, gated, norm_weight, epsilon, residual, dense
        )
    if x.stride(1) != 1 or x.stride(0) % 8 or x.storage_offset() % 8:
        x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    return launch_gather(
        x,
        weights,
        norms,
        thresholds,
        biases,
        arrived,
        gated=gated,
        norm_weight=norm_weight,
        epsilon=epsilon,
        residual=residual,
        dense=dense,
        early=early,
    )[0]


@_gather_gemv_quantised_op.register_fake
def _(
    x: Tensor,
    packed: list[Tensor],
    scales: list[Tensor],
    bits: int,
    group: int,
    widths: list[int],
    *others: Any,
    gated: bool = False,
    **_: Any,
) -> Tensor:
    gated = others[4] if len(others) > 4 else gated
    return x.new_empty((x.shape[0], widths[0] if gated else sum(widths)))


def gather_gemv_quantised(
    x: Tensor,
    weights: list[QuantisedWeight],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    arrived: Tensor,
    *,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """:func:`was_kernels.gather_gemv.gather_gemv` on rounded weights.

    Masks, order of sums and arguments are the same, but for ``weights``: all of one format, with widths that are
    multiples of 32. An infinite input gives what is not finite, possibly NaN.

    Raises:
        ValueError: shapes, dtypes or counts other than these.
    """
    bits, group = weights[0].bits, weights[0].group
    if any((weight.bits, weight.group) != (bits, group) for weight in weights):
        raise ValueError("weights: one format for all needed")
    y: Tensor = torch.ops.was.gather_gemv_quantised(
        x,
        [weight.packed for weight in weights],
        [weight.scales for weight in weights],
        bits,
        group,
        [weight.width for weight in weights],
        norms,
        thresholds,
        biases,
        arrived,
        gated,
        norm_weight,
        epsilon,
        residual,
        dense,
        early,
    )
    return y
