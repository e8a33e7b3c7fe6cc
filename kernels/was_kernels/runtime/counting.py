"""Count the channels kept while decoding: the achieved sparsity of the one-token steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from was_search.shape import FloatArray, ModelShape


class ProjectionCount:
    """Channels kept and seen by one projection, summed in place on its device, without a sync."""

    def __init__(self, device: torch.device) -> None:
        self._kept = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, keep: Tensor, dense: Tensor | None) -> None:
        """Count ``keep``, bool [rows, d]; rows flagged in ``dense`` [rows] are left out."""
        if dense is None:
            self._kept.add_(keep.sum())
            self._seen.add_(keep.numel())
        else:
            live = ~dense
            self._kept.add_((keep & live[:, None]).sum())
            self._seen.add_(live.sum() * keep.shape[1])

    @property
    def kept(self) -> int:
        return int(self._kept)

    @property
    def seen(self) -> int:
        return int(self._seen)


class KeptCounts:
    """Counts of all projections of a model; reading them waits for the device."""

    def __init__(self, shape: ModelShape, rows: list[list[ProjectionCount]]) -> None:
        self._shape = shape
        self._rows = rows

    @property
    def tokens(self) -> int:
        """Tokens counted: decoded in one-token steps, outside the dense prefix."""
        return self._rows[0][0].seen // self._shape.in_features[0][0]

    def achieved(self) -> FloatArray:
        """Share of channels dropped, float64 [L, 7]; zeros where nothing was counted."""
        kept = np.array([[count.kept for count in row] for row in self._rows], np.float64)
        seen = np.array([[count.seen for count in row] for row in self._rows], np.float64)
        return np.where(seen > 0, 1.0 - kept / np.maximum(seen, 1.0), 0.0)

    def sparsity(self) -> float:
        """Parameter-weighted mean of :meth:`achieved`."""
        return self._shape.sparsity(self.achieved())
