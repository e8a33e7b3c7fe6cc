"""Attention of one decoding step in parts, each computed by one block; the launch that reads them merges them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionParts:
    """The result of :func:`was_kernels.ops.attend.attend_in_parts`, on the device.

    Attributes:
        parts: float32 [B, key heads, splits, queries, head size + 2]: for each split its weighted sum of values, the
            peak of its scores in units of log2, and the sum of the weights relative to that peak.
        length: int64 scalar tensor, positions filled before this step. Whoever merges the parts makes it one longer.
        dtype: of the merged attention.
    """

    parts: Tensor
    length: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels of the merged attention, query heads side by side."""
        rows, heads, _, queries, part = self.parts.shape
        return rows, heads * queries * (part - 2)

    @property
    def device(self) -> torch.device:
        return self.parts.device

    @property
    def macros(self) -> dict[str, int]:
        """Macros for ``cuda/parts.cuh``."""
        _, _, splits, queries, part = self.parts.shape
        return {"SPLITS": splits, "QUERIES": queries, "HEAD": part - 2}

    def merged(self) -> Tensor:
        """The attention [B, channels] in ``dtype``, in plain torch; rows that saw nothing are zero.

        The length stays as it is.
        """
        sums, peaks, masses = self.parts[..., :-2], self.parts[..., -2:-1], self.parts[..., -1:]
        top = peaks.amax(dim=2, keepdim=True)
        takes = torch.where(top.isneginf(), torch.zeros_like(peaks), torch.exp2(peaks - top))
        mass = (masses * takes).sum(dim=2)
        merged = torch.where(mass == 0.0, torch.zeros_like(mass), (sums * takes).sum(dim=2) / mass)
        return merged.reshape(self.shape).to(self.dtype)
