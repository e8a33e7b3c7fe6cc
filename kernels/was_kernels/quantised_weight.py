"""A rounded weight as the kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantisedWeight:
    """``W[o, j] = scale[j, o // group] * q[j, o] + offset[j, o // group]``, q in ``bits`` bits.

    Attributes:
        packed: uint8 [d_in, bytes] contiguous: the outputs of an input channel one after another; at 4 bits two in a
            byte, the first in its low half.
        scales: float16 [d_in, groups, 2] contiguous: scale and offset.
        bits: 8 or 4.
        group: outputs of a group, a multiple of 32; the last group may be short.
        width: outputs.
    """

    packed: Tensor
    scales: Tensor
    bits: int
    group: int
    width: int

    def require(self, d_in: int) -> None:
        """Raise a ValueError if this is not a weight of ``d_in`` channels."""
        if self.bits not in (4, 8) or self.group < 32 or self.group % 32:
            raise ValueError(f"bits, group: 4 or 8, and a multiple of 32 needed, got {self.bits} and {self.group}")
        packed, scales = self.packed, self.scales
        wanted = (d_in, -(-self.width * self.bits // 8))
        if packed.shape != wanted or packed.dtype != torch.uint8 or not packed.is_contiguous():
            raise ValueError(f"packed: contiguous uint8 {list(wanted)} needed, got {packed.dtype} {list(packed.shape)}")
        pairs = (d_in, -(-self.width // self.group), 2)
        if scales.shape != pairs or scales.dtype != torch.float16 or not scales.is_contiguous():
            raise ValueError(
                f"scales: contiguous float16 {list(pairs)} needed, got {scales.dtype} {list(scales.shape)}"
            )
