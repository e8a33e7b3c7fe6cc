"""A weight as the kernels read it: an input channel's outputs one after another, as stored or rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from was_kernels.ops.correction import Correction

MAX_ROWS = 16
"""Rows of x that one launch takes; the CUDA kernel takes half as many of rounded weights."""


@dataclass(frozen=True)
class ColumnWeight:
    """The weight W of a linear map, as stored, or rounded so that W = scale * q + offset.

    ``W[o, j]`` takes the scale and offset of channel j and group ``o // group``.

    Attributes:
        columns: [d_in, width] with unit last stride; if rounded, uint8 [d_in, bytes] contiguous: q, at 4 bits two in a
            byte, the first in its low half.
        scales: if rounded, float16 [d_in, groups, 2] contiguous: scale and offset; else None.
        bits: 8 or 4 if rounded, else those of the dtype.
        group: outputs of a group, a multiple of 32, the last of which may be short; 1 if nothing is rounded.
        width: outputs.
    """

    columns: Tensor
    scales: Tensor | None
    bits: int
    group: int
    width: int

    @staticmethod
    def as_stored(columns: Tensor) -> ColumnWeight:
        """A weight that is not rounded: ``columns`` [d_in, width] is the transposed weight of a linear map."""
        return ColumnWeight(columns, None, columns.element_size() * 8, 1, columns.shape[-1])

    def detached(self) -> ColumnWeight:
        """The same numbers apart from any parameter that holds them."""
        return replace(self, columns=self.columns.detach())

    @property
    def format(self) -> tuple[bool, int, int]:
        """Whether it is rounded, bits and group: equal for all weights of one launch."""
        return self.scales is None, self.bits, self.group

    @property
    def multiple(self) -> int:
        """The CUDA kernel takes widths that are multiples of this: rows then start at multiples of 16 bytes."""
        return 8 if self.scales is None else 32

    @property
    def max_rows(self) -> int:
        """Rows of x that one launch of the CUDA kernel takes."""
        return MAX_ROWS if self.scales is None else MAX_ROWS // 2

    @property
    def channel_bytes(self) -> int:
        """Bytes of one input channel, scales and offsets with them."""
        scales = 0 if self.scales is None else self.scales.shape[1] * 4
        return self.columns.shape[1] * self.columns.element_size() + scales

    def require(self, d_in: int, dtype: torch.dtype) -> None:
        """Check that this is a weight of ``d_in`` channels for inputs of ``dtype``.

        Raises:
            ValueError: it is not.
        """
        columns, scales = self.columns, self.scales
        if scales is None:
            if columns.dim() != 2 or columns.shape[0] != d_in or (self.width > 1 and columns.stride(1) != 1):
                raise ValueError(
                    f"weight: [{d_in}, width] with unit last stride needed, got {list(columns.shape)} with strides "
                    f"{columns.stride()}"
                )
            if columns.dtype != dtype:
                raise ValueError(f"weight: must have x's dtype {dtype}, got {columns.dtype}")
            return
        if self.bits not in (4, 8) or self.group < 32 or self.group % 32:
            raise ValueError(f"bits, group: 4 or 8, and a multiple of 32 needed, got {self.bits} and {self.group}")
        wanted = (d_in, -(-self.width * self.bits // 8))
        if columns.shape != wanted or columns.dtype != torch.uint8 or not columns.is_contiguous():
            raise ValueError(
                f"weight: contiguous uint8 {list(wanted)} needed, got {columns.dtype} {list(columns.shape)}"
            )
        pairs = (d_in, -(-self.width // self.group), 2)
        if scales.shape != pairs or scales.dtype != torch.float16 or not scales.is_contiguous():
            raise ValueError(
                f"scales: contiguous float16 {list(pairs)} needed, got {scales.dtype} {list(scales.shape)}"
            )

    def written_out(self) -> Tensor:
        """The weight as a plain [d_in, width]: as stored, or in float32 where it is rounded."""
        if self.scales is None:
            return self.columns
        packed, n_groups = self.columns, self.scales.shape[1]
        q = packed if self.bits == 8 else torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
        q = torch.nn.functional.pad(q[:, : self.width].float(), (0, n_groups * self.group - self.width))
        scale, offset = self.scales.float().unsqueeze(3).unbind(2)  # [d_in, groups, 1]
        return torch.addcmul(offset, q.view(len(q), n_groups, self.group), scale).flatten(1)[:, : self.width]


@dataclass(frozen=True)
class SparseMap:
    """A linear map that reads the channels of x with ``abs(x) * norms >= threshold`` only.

    Scores are float32; ties are kept, NaN is dropped, and a threshold of zero or less keeps all.

    Attributes:
        weight: W, of d_in channels.
        norms: float32 [d_in] contiguous.
        threshold: in the unit of ``abs(x) * norms``.
        bias: [width] contiguous, or None.
        correction: of the outputs of rows that are not dense, whatever the threshold; None: they are not corrected.
    """

    weight: ColumnWeight
    norms: Tensor
    threshold: float
    bias: Tensor | None = None
    correction: Correction | None = None

    def require(self, d_in: int, dtype: torch.dtype) -> None:
        """Check that the map takes inputs of ``d_in`` channels and ``dtype``.

        Raises:
            ValueError: it does not.
        """
        self.weight.require(d_in, dtype)
        norms, bias, width = self.norms, self.bias, self.weight.width
        if norms.shape != (d_in,) or norms.dtype != torch.float32 or not norms.is_contiguous():
            raise ValueError(f"norms: contiguous float32 [{d_in}] needed, got {norms.dtype} {list(norms.shape)}")
        if bias is not None and (bias.shape != (width,) or not bias.is_contiguous()):
            raise ValueError(f"bias: contiguous [{width}] needed, got {list(bias.shape)}")
        if self.correction is not None:
            self.correction.require(width)
