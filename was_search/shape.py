"""What the search knows of a model's size: the seven projections of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.errors import ModelError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linear maps of a block, in the order of every ``[L, 7]`` array."""

N_PROJECTIONS = len(PROJECTIONS)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ModelShape:
    """Input and output features of the seven projections of L blocks, read from the weights.

    Attributes:
        in_features: L rows of seven input widths, in channels.
        out_features: L rows of seven output widths, in channels.
    """

    in_features: tuple[tuple[int, ...], ...]
    out_features: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            rows = getattr(self, name)
            if not rows or any(len(row) != N_PROJECTIONS or min(row) < 1 for row in rows):
                raise ModelError(f"{name}: every block needs {N_PROJECTIONS} positive widths, got {rows!r}")
        if len(self.in_features) != len(self.out_features):
            raise ModelError("in_features and out_features: different numbers of blocks")

    @property
    def n_blocks(self) -> int:
        return len(self.in_features)

    @property
    def params(self) -> IntArray:
        """Weights of each projection, [L, 7] int64; biases are not counted (they are never skipped)."""
        return np.asarray(self.in_features, np.int64) * np.asarray(self.out_features, np.int64)

    @property
    def block_params(self) -> IntArray:
        """Weights of each block's seven projections, [L] int64."""
        totals: IntArray = self.params.sum(axis=1)
        return totals

    def sparsity(self, sparsities: npt.ArrayLike) -> float:
        """Parameter-weighted mean of ``sparsities`` [L, 7]: the one way a model's sparsity is counted."""
        return float((np.asarray(sparsities, np.float64) * self.params).sum() / self.params.sum())

    def levels(self, sparsities: npt.ArrayLike) -> FloatArray:
        """Parameter-weighted mean of each block's row of ``sparsities`` [L, 7]; returns [L] float64."""
        weighted: FloatArray = (np.asarray(sparsities, np.float64) * self.params).sum(axis=1)
        return weighted / self.block_params

    def to_json(self) -> dict[str, Any]:
        return {
            "in_features": [list(r) for r in self.in_features],
            "out_features": [list(r) for r in self.out_features],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelShape:
        return cls(
            tuple(tuple(int(v) for v in row) for row in value["in_features"]),
            tuple(tuple(int(v) for v in row) for row in value["out_features"]),
        )
