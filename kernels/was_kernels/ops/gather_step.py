"""Sparse projections of one decoding step that share an input: what they are, and what they give in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.ops.attention_parts import AttentionParts
from was_kernels.ops.column_weight import SparseMap
from was_kernels.ops.reference import rms_norm, sparse_gemv_reference

HALF = (torch.float16, torch.bfloat16)
MAX_CHANNELS = 1 << 16
_MAX_MAPS = 3


@dataclass(frozen=True)
class GatherStep:
    """The inputs of one launch: ``y_p = W_p[:, kept_p] x[kept_p] + bias_p``, or corrected, side by side.

    Attributes:
        x: [B, d_in], float16 or bfloat16, B up to the weights' ``max_rows``, d_in up to 65,536; or parts of attention,
            which are merged first.
        maps: up to three, with weights of one format whose widths are multiples of their ``multiple``; all with a
            correction, or none.
        gated: the result is ``silu(y_0) * y_1``; takes two maps of one width.
        norm_weight: [d_in], a multiple of 8: x goes through RMSNorm with this weight first, as Llama's.
        epsilon: of the RMSNorm.
        residual: shaped like the result, and added to it.
        dense: bool [B]: rows that keep every channel and are not corrected.
    """

    x: Tensor | AttentionParts
    maps: Sequence[SparseMap]
    gated: bool = False
    norm_weight: Tensor | None = None
    epsilon: float = 0.0
    residual: Tensor | None = None
    dense: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns of the result."""
        widths = [sparse.weight.width for sparse in self.maps]
        return widths[0] if self.gated else sum(widths)

    @property
    def corrected(self) -> bool:
        """Whether outputs are corrected."""
        return self.maps[0].correction is not None

    def require_one_format(self) -> None:
        """Check that there are one to three maps, whose weights are all as stored or all rounded alike.

        Raises:
            ValueError: other counts or formats, or some are corrected and others are not.
        """
        if not 1 <= len(self.maps) <= _MAX_MAPS:
            raise ValueError(f"maps: one to three needed, got {len(self.maps)}")
        if any(sparse.weight.format != self.maps[0].weight.format for sparse in self.maps):
            raise ValueError("weights: one format for all needed")
        if any((sparse.correction is not None) != self.corrected for sparse in self.maps):
            raise ValueError("maps: all with a correction needed, or none")

    def require(self) -> None:
        """Check everything that the kernel takes for granted, where x is a tensor.

        Raises:
            ValueError: shapes, dtypes, strides or counts other than the attributes say.
        """
        assert isinstance(self.x, Tensor)
        self.require_one_format()
        weights = [sparse.weight for sparse in self.maps]
        if self.gated and (len(weights) != 2 or weights[0].width != weights[1].width or self.residual is not None):
            raise ValueError("gated: takes two weights of one width and no residual")
        most, shape = weights[0].max_rows, self.x.shape
        if self.x.dim() != 2 or not 1 <= shape[0] <= most or shape[1] > MAX_CHANNELS:
            raise ValueError(f"x: [1 to {most}, up to {MAX_CHANNELS}] needed, got {list(shape)}")
        if self.norm_weight is not None and shape[1] % 8:
            raise ValueError(f"norm_weight: takes x of a multiple of 8 channels, got {shape[1]}")
        for sparse in self.maps:
            sparse.require(shape[1], self.x.dtype)
            weight = sparse.weight
            if weight.width % weight.multiple:
                raise ValueError(f"weights: widths that are a multiple of {weight.multiple} needed, got {weight.width}")
            if weight.scales is None and (weight.columns.stride(0) % 8 or weight.columns.storage_offset() % 8):
                raise ValueError("weights: rows must start at multiples of 16 bytes")


def gather_reference(step: GatherStep) -> Tensor:
    """What :func:`was_kernels.ops.gather_gemv.gather_gemv` computes, in plain torch."""
    x = step.x.merged() if isinstance(step.x, AttentionParts) else step.x
    if step.norm_weight is not None:
        x = rms_norm(x, step.norm_weight, step.epsilon)
    outs = [sparse_gemv_reference(x, sparse, step.dense) for sparse in step.maps]
    y = F.silu(outs[0]) * outs[1] if step.gated else torch.cat(outs, dim=1)
    return y if step.residual is None else step.residual + y
