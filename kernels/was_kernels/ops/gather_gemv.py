"""Sparse projections of one decoding step that share an input, in one launch of CUDA C++ (``cuda/gather_gemv.cu``).

A torch custom op, so that ``torch.compile`` and CUDA graphs take it. On CPU it runs in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.correction import Correction
from was_kernels.ops.gather_launch import launch_gather
from was_kernels.ops.gather_step import GatherStep, gather_reference


@torch.library.custom_op(
    "was::gather_gemv",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] columns, Tensor[] scales, int bits, int group, int[] widths, Tensor[] norms, "
        "float[] thresholds, Tensor?[] biases, Tensor workspace, bool gated=False, Tensor? norm_weight=None, "
        "float epsilon=0.0, Tensor? residual=None, Tensor? dense=None, bool early=False, "
        "Tensor[]? corrections=None) -> Tensor"
    ),
)
def _gather_gemv_op(
    x: Tensor,
    columns: list[Tensor],
    scales: list[Tensor],
    bits: int,
    group: int,
    widths: list[int],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    workspace: Tensor,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
    early: bool = False,
    corrections: list[Tensor] | None = None,
) -> Tensor:
    """:func:`gather_gemv` laid out flat, as an op's schema must be.

    There are no ``scales`` where nothing is rounded; ``corrections`` are each map's scale and constant.
    """
    kinds: list[Tensor | None] = [*scales] or [None] * len(columns)
    weights = [ColumnWeight(c, s, bits, group, width) for c, s, width in zip(columns, kinds, widths, strict=True)]
    given = [None] * len(columns) if corrections is None else list(starmap(Correction, _pairs(corrections)))
    maps = [SparseMap(*parts) for parts in zip(weights, norms, thresholds, biases, given, strict=True)]
    step = GatherStep(x, maps, gated, norm_weight, epsilon, residual, dense)
    step.require()
    if not x.is_cuda:
        return gather_reference(step)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.storage_offset() % 8:
        step = replace(step, x=x.contiguous())
    if residual is not None:
        step = replace(step, residual=residual.contiguous())
    return launch_gather(step, workspace, early=early)[0]


@_gather_gemv_op.register_fake
def _(
    x: Tensor,
    columns: list[Tensor],
    scales: list[Tensor],
    bits: int,
    group: int,
    widths: list[int],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    workspace: Tensor,
    gated: bool = False,
    *_: Any,
    **__: Any,
) -> Tensor:
    return x.new_empty((x.shape[0], widths[0] if gated else sum(widths)))


def gather_gemv(step: GatherStep, workspace: Tensor, *, early: bool = False) -> Tensor:
    """The sparse projections of ``step`` in one launch.

    Each projection and each row of x has its own mask. Weights of a channel that all rows drop are not read. Sums are
    float32 in a fixed order: the same inputs give the same bits on the same device. An infinite input that is kept
    gives an infinity or NaN; with rounded weights possibly NaN where the exact result is infinite.

    Args:
        step: the inputs; x is a tensor, not parts of attention.
        workspace: from :func:`was_kernels.ops.gather_launch.new_workspace`; not to be shared by kernels that may run
            at once.
        early: on Hopper and newer, start while the kernel before ends. Then that kernel must have made nothing but
            ``x``; norms, ``norm_weight`` and corrections are read before it has ended.

    Returns:
        [B, sum of widths], or [B, width] when gated.

    Raises:
        ValueError: shapes, dtypes or counts other than :class:`GatherStep` says.
    """
    step.require_one_format()
    weights = [sparse.weight for sparse in step.maps]
    given = [sparse.correction for sparse in step.maps if sparse.correction is not None]
    y: Tensor = torch.ops.was.gather_gemv(
        step.x,
        [weight.columns for weight in weights],
        [weight.scales for weight in weights if weight.scales is not None],
        weights[0].bits,
        weights[0].group,
        [weight.width for weight in weights],
        [sparse.norms for sparse in step.maps],
        [sparse.threshold for sparse in step.maps],
        [sparse.bias for sparse in step.maps],
        workspace,
        step.gated,
        step.norm_weight,
        step.epsilon,
        step.residual,
        step.dense,
        early,
        [vector for each in given for vector in (each.scale, each.constant)] or None,
    )
    return y


def _pairs(vectors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(vectors[::2], vectors[1::2], strict=True)
