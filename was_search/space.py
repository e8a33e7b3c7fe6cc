"""The search space: raw suggestions by parameter name -> a vector that meets the budget exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution

from was_search.budget import project
from was_search.errors import InfeasibleError
from was_search.shape import FloatArray, ModelShape
from was_search.table import Table


class Space(Protocol):
    """Maps Optuna parameters to vectors. Pure: no state changes."""

    @property
    def table(self) -> Table:
        """Turns the vector into projection sparsities."""
        ...

    @property
    def distributions(self) -> dict[str, BaseDistribution]: ...

    @property
    def centre(self) -> dict[str, float]:
        """Parameters of the point that the search starts around."""
        ...

    def levels(self, params: dict[str, float]) -> FloatArray:
        """The projected vector [L]; its parameter-weighted mean is the target to float64 rounding."""
        ...


@dataclass(frozen=True)
class LevelSpace:
    """One free level a block, within ``radius`` around a seed vector.

    The raw levels lie in a box around the seed, so that a sampler's prior is centred there; projection shifts
    them onto the budget. Nothing ties a block to its neighbours.
    """

    shape: ModelShape
    table: Table
    seed_levels: FloatArray
    target: float
    radius: float = 0.05

    def __post_init__(self) -> None:
        if self.radius <= 0.0:
            raise InfeasibleError(f"radius: must be positive, got {self.radius}")

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        highest = self.table.max_levels
        return {
            level_name(b, len(highest)): FloatDistribution(
                max(0.0, float(level) - self.radius), min(float(highest[b]), float(level) + self.radius)
            )
            for b, level in enumerate(self.seed_levels)
        }

    @property
    def centre(self) -> dict[str, float]:
        return level_params(self.seed_levels)

    def levels(self, params: dict[str, float]) -> FloatArray:
        n = len(self.seed_levels)
        raw = np.array([params[level_name(b, n)] for b in range(n)])
        return project(raw, self.shape.block_params, self.target, 0.0, self.table.max_levels)


@dataclass(frozen=True)
class MonotoneSpace:
    """Levels that rise with depth: WAS's rule (EMNLP 2025), kept as a named baseline.

    A first level and non-negative rises, summed up, then projected with the same bounds for all blocks, which
    keeps the order.
    """

    shape: ModelShape
    table: Table
    target: float
    largest_rise: float = 0.05

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        n = self.shape.n_blocks
        rises: dict[str, BaseDistribution] = {
            f"rise_{b:0{len(str(n - 1))}d}": FloatDistribution(0.0, self.largest_rise) for b in range(1, n)
        }
        return {level_name(0, n): FloatDistribution(0.0, self.target), **rises}

    @property
    def centre(self) -> dict[str, float]:
        return {name: self.target if name.startswith("level") else 0.0 for name in self.distributions}

    def levels(self, params: dict[str, float]) -> FloatArray:
        raw = np.cumsum([params[name] for name in self.distributions])
        return project(raw, self.shape.block_params, self.target, 0.0, float(self.table.max_levels.min()))


def level_name(block: int, n_blocks: int) -> str:
    """``level_07``: Optuna's name of a block's level, padded so that names sort by depth."""
    return f"level_{block:0{len(str(n_blocks - 1))}d}"


def level_params(levels: FloatArray) -> dict[str, float]:
    return {level_name(b, len(levels)): float(level) for b, level in enumerate(levels)}


def open_distributions(n_blocks: int) -> dict[str, BaseDistribution]:
    """Distributions [0, 1] for vectors that come from outside a space (seeds on another table)."""
    return {level_name(b, n_blocks): FloatDistribution(0.0, 1.0) for b in range(n_blocks)}
