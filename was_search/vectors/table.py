"""The table: per block, the seven projection sparsities at every level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.errors import InfeasibleError
from was_search.shape import N_PROJECTIONS, FloatArray, ModelShape


@dataclass(frozen=True)
class BlockTable:
    """One block's path from nothing dropped to as much as the path reaches.

    Between two rows the sparsities are interpolated. Rows lie where the greedy turns from one projection to
    another, so interpolation gives the greedy's own result at any level between.

    Attributes:
        levels: float64 [rows], from 0, strictly rising.
        sparsities: float64 [rows, 7]; each row's parameter-weighted mean is its level.
    """

    levels: FloatArray
    sparsities: FloatArray

    def __post_init__(self) -> None:
        rows = self.levels.shape
        if len(rows) != 1 or rows[0] < 1 or self.sparsities.shape != (*rows, N_PROJECTIONS):
            raise InfeasibleError(
                f"block table: shapes [rows] and [rows, 7] needed, got {rows} and {self.sparsities.shape}"
            )
        if self.levels[0] != 0.0 or not np.all(np.diff(self.levels) > 0.0):
            raise InfeasibleError("block table: levels must rise strictly from 0")

    def row(self, level: float) -> FloatArray:
        """Sparsities [7] at ``level``, which must be in [0, highest level]."""
        if not -1e-9 <= level <= self.levels[-1] + 1e-9:
            raise InfeasibleError(f"level: must be in [0, {self.levels[-1]:.4f}], got {level}")
        return np.array([np.interp(level, self.levels, self.sparsities[:, p]) for p in range(N_PROJECTIONS)])


@dataclass(frozen=True)
class Table:
    """The L block tables of a model, and where they come from (``uniform``, ``greedy`` or ``fisher``)."""

    name: str
    blocks: tuple[BlockTable, ...]

    @property
    def max_levels(self) -> FloatArray:
        """Highest level of each block, [L]."""
        return np.array([block.levels[-1] for block in self.blocks])

    def sparsities(self, levels: npt.ArrayLike) -> FloatArray:
        """Projection sparsities [L, 7] of the vector ``levels`` [L].

        Raises:
            InfeasibleError: a level outside the table, or another number of levels.
        """
        vector = np.asarray(levels, np.float64)
        if vector.shape != (len(self.blocks),):
            raise InfeasibleError(f"levels: shape must be ({len(self.blocks)},), got {vector.shape}")
        return np.stack([block.row(float(level)) for block, level in zip(self.blocks, vector, strict=True)])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "blocks": [{"levels": b.levels.tolist(), "sparsities": b.sparsities.tolist()} for b in self.blocks],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Table:
        return cls(
            str(value["name"]),
            tuple(
                BlockTable(np.asarray(b["levels"], np.float64), np.asarray(b["sparsities"], np.float64))
                for b in value["blocks"]
            ),
        )


def uniform_table(shape: ModelShape, highest: float = 0.99) -> Table:
    """The table in which every projection is at its block's level."""
    block = BlockTable(np.array([0.0, highest]), np.array([np.zeros(N_PROJECTIONS), np.full(N_PROJECTIONS, highest)]))
    return Table("uniform", (block,) * shape.n_blocks)
