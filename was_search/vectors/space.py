"""The search space: raw suggestions by parameter name -> a vector that meets the budget exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution

from was_search.errors import ConfigError, InfeasibleError
from was_search.shape import PROJECTIONS, FloatArray, ModelShape
from was_search.vectors.budget import Budget, project
from was_search.vectors.seeds import Seed
from was_search.vectors.table import Table

SpaceName = Literal["levels", "temperature", "additive", "full"]
SPACES: tuple[SpaceName, ...] = get_args(SpaceName)

HIGHEST_SAMPLED = 0.99
"""Highest sparsity of a projection in a space, whatever a seed's table allows; the end of the uniform table."""


class Space(Protocol):
    """Maps Optuna parameters to sparsities that meet the budget exactly. Pure: no state changes."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]: ...

    @property
    def centre(self) -> dict[str, float]:
        """Parameters of the point that the search starts around."""
        ...

    def levels(self, params: dict[str, float]) -> FloatArray:
        """The levels [L] of :meth:`sparsities`."""
        ...

    def sparsities(self, params: dict[str, float]) -> FloatArray:
        """Projection sparsities [L, 7]; they meet the budget to float64 rounding."""
        ...

    def locate(self, seed: Seed) -> dict[str, float] | None:
        """Parameters that give ``seed``, perhaps outside the bounds; None if the space does not hold it."""
        ...


@dataclass(frozen=True)
class LevelSpace:
    """One free level a block, within ``radius`` around a seed vector.

    The raw levels lie in a box around the seed, so that a sampler's prior is centred there; projection shifts
    them onto the budget. Nothing ties a block to its neighbours.
    """

    budget: Budget
    table: Table
    seed_levels: FloatArray
    radius: float = 0.05

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        n, highest = len(self.seed_levels), self.table.max_levels
        return {
            level_name(b, n): _around(float(level), self.radius, float(highest[b]))
            for b, level in enumerate(self.seed_levels)
        }

    @property
    def centre(self) -> dict[str, float]:
        return level_params(self.seed_levels)

    def levels(self, params: dict[str, float]) -> FloatArray:
        n = len(self.seed_levels)
        raw = np.array([params[level_name(b, n)] for b in range(n)])
        return self.budget.onto_levels(raw, self.table, self.table.max_levels)

    def sparsities(self, params: dict[str, float]) -> FloatArray:
        return self.table.sparsities(self.levels(params))

    def locate(self, seed: Seed) -> dict[str, float] | None:
        return level_params(seed.levels) if seed.table.name == self.table.name else None


@dataclass(frozen=True)
class TemperatureSpace:
    """The levels of :class:`LevelSpace`, and a temperature: how strongly blocks follow the table's split of a level.

    With the table's split t of a level l, a block's sparsities are ``l + temperature * (t - l)``, projected so that
    their mean stays l: 0 is flat (all projections at the level), 1 the table's split, 2 twice its contrasts.

    One temperature serves all blocks. What it mends is an error that they share: prices of single projections do
    not add up, and the more is dropped the less so, so that a table's contrasts are all too weak or all too
    strong. One parameter is learnt in tens of evaluations; one a block would double the dimensions, and each of
    them moves the loss by little.
    """

    budget: Budget
    table: Table
    seed_levels: FloatArray
    radius: float = 0.05
    hottest: float = 2.0

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        if self.hottest < 1.0:
            raise InfeasibleError(f"hottest: must be at least 1, the table's own split, got {self.hottest}")

    @property
    def _levels(self) -> LevelSpace:
        return LevelSpace(self.budget, self.table, self.seed_levels, self.radius)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {**self._levels.distributions, "temperature": FloatDistribution(0.0, self.hottest)}

    @property
    def centre(self) -> dict[str, float]:
        return {**level_params(self.seed_levels), "temperature": 1.0}

    def levels(self, params: dict[str, float]) -> FloatArray:
        return self.budget.shape.levels(self.sparsities(params))

    def sparsities(self, params: dict[str, float]) -> FloatArray:
        levels = self._levels.levels(params)
        split = self.table.sparsities(levels) - levels[:, None]
        raw = levels[:, None] + params["temperature"] * split
        rows = [
            project(row, count, float(level), 0.0, HIGHEST_SAMPLED)
            for row, count, level in zip(raw, self.budget.shape.params, levels, strict=True)
        ]
        # Another split of the same levels may take another time.
        return self.budget.onto(np.stack(rows), HIGHEST_SAMPLED)

    def locate(self, seed: Seed) -> dict[str, float] | None:
        if seed.table.name == self.table.name:
            return {**level_params(seed.levels), "temperature": 1.0}
        if seed.table.name == "uniform":
            return {**level_params(seed.levels), "temperature": 0.0}
        return None


@dataclass(frozen=True)
class AdditiveSpace:
    """All 7 L projections through L + 7 offsets: the seed's sparsity + its block's offset + its kind's offset.

    Kinds that share a mask have one offset.

    Needs no table, so the seed may be any point. An offset of all blocks, or of all kinds, does nothing:
    projection takes it away.
    """

    budget: Budget
    seed: Seed
    radius: float = 0.05

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        _check_sparsities(self.budget.shape, self.seed)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: FloatDistribution(-self.radius, self.radius) for name in self._names}

    @property
    def centre(self) -> dict[str, float]:
        return dict.fromkeys(self._names, 0.0)

    @property
    def _names(self) -> list[str]:
        n, groups = self.budget.shape.n_blocks, self.budget.shape.groups
        return [*(block_name(b, n) for b in range(n)), *(f"kind_{group_name(group)}" for group in groups)]

    def levels(self, params: dict[str, float]) -> FloatArray:
        return self.budget.shape.levels(self.sparsities(params))

    def sparsities(self, params: dict[str, float]) -> FloatArray:
        offsets = np.array([params[name] for name in self._names])
        n = self.budget.shape.n_blocks
        raw = self.seed.sparsities + offsets[:n, None]
        for group, offset in zip(self.budget.shape.groups, offsets[n:], strict=True):
            raw[:, list(group)] += offset
        return self.budget.onto(raw, HIGHEST_SAMPLED)

    def locate(self, seed: Seed) -> dict[str, float] | None:
        return self.centre if seed.name == self.seed.name else None


@dataclass(frozen=True)
class FullSpace:
    """All 7 L projection sparsities, each within ``radius`` around the seed's; projections of one mask have one."""

    budget: Budget
    seed: Seed
    radius: float = 0.05

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        _check_sparsities(self.budget.shape, self.seed)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: _around(value, self.radius, HIGHEST_SAMPLED) for name, value in self.centre.items()}

    @property
    def centre(self) -> dict[str, float]:
        return self._params(self.seed.sparsities)

    def levels(self, params: dict[str, float]) -> FloatArray:
        return self.budget.shape.levels(self.sparsities(params))

    def sparsities(self, params: dict[str, float]) -> FloatArray:
        raw = np.empty(self.budget.shape.params.shape)
        for b, group in self._inputs:
            raw[b, list(group)] = params[f"{block_name(b, self.budget.shape.n_blocks)}_{group_name(group)}"]
        return self.budget.onto(raw, HIGHEST_SAMPLED)

    def locate(self, seed: Seed) -> dict[str, float] | None:
        return self._params(seed.sparsities)

    def _params(self, sparsities: FloatArray) -> dict[str, float]:
        n, tied = self.budget.shape.n_blocks, self.budget.shape.tie(sparsities)
        return {f"{block_name(b, n)}_{group_name(group)}": float(tied[b, group[0]]) for b, group in self._inputs}

    @property
    def _inputs(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(b, group) for b in range(self.budget.shape.n_blocks) for group in self.budget.shape.groups]


@dataclass(frozen=True)
class MonotoneSpace:
    """Levels that rise with depth: WAS's rule (EMNLP 2025), kept as a named baseline.

    A first level and non-negative rises, summed up, then projected with the same bounds for all blocks, which
    keeps the order.
    """

    budget: Budget
    table: Table
    largest_rise: float = 0.05

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        n = self.budget.shape.n_blocks
        rises: dict[str, BaseDistribution] = {
            f"rise_{b:0{len(str(n - 1))}d}": FloatDistribution(0.0, self.largest_rise) for b in range(1, n)
        }
        return {level_name(0, n): FloatDistribution(0.0, self._flat), **rises}

    @property
    def centre(self) -> dict[str, float]:
        return {name: self._flat if name.startswith("level") else 0.0 for name in self.distributions}

    @property
    def _flat(self) -> float:
        return self.budget.flat

    def levels(self, params: dict[str, float]) -> FloatArray:
        raw = np.cumsum([params[name] for name in self.distributions])
        highest = float(self.table.max_levels.min())
        return self.budget.onto_levels(raw, self.table, highest)

    def sparsities(self, params: dict[str, float]) -> FloatArray:
        return self.table.sparsities(self.levels(params))

    def locate(self, seed: Seed) -> dict[str, float] | None:
        """None, as the baseline knows no seeds."""
        return None


def make_space(name: SpaceName, seed: Seed, budget: Budget, radius: float) -> Space:
    """The space called ``name`` around ``seed``.

    Raises:
        ConfigError: an unknown name.
        InfeasibleError: a radius that is not positive.
    """
    match name:
        case "levels":
            return LevelSpace(budget, seed.table, seed.levels, radius)
        case "temperature":
            return TemperatureSpace(budget, seed.table, seed.levels, radius)
        case "additive":
            return AdditiveSpace(budget, seed, radius)
        case "full":
            return FullSpace(budget, seed, radius)
    raise ConfigError(f"space: must be one of {', '.join(SPACES)}, got {name!r}")


def level_name(block: int, n_blocks: int) -> str:
    """``level_07``: Optuna's name of a block's level, padded so that names sort by depth."""
    return f"level_{block:0{len(str(n_blocks - 1))}d}"


def block_name(block: int, n_blocks: int) -> str:
    """``block_07``: a block in Optuna's names of offsets and of single projections, padded as by :func:`level_name`."""
    return f"block_{block:0{len(str(n_blocks - 1))}d}"


def kind_name(projection: int) -> str:
    """``3_o``: a projection in Optuna's names, numbered so that names sort in the order of PROJECTIONS."""
    return f"{projection}_{PROJECTIONS[projection]}"


def group_name(group: tuple[int, ...]) -> str:
    """``0_q_k_v``: projections that share a mask, named as one; a single one as by :func:`kind_name`."""
    return "_".join([kind_name(group[0]), *(PROJECTIONS[p] for p in group[1:])])


def level_params(levels: FloatArray) -> dict[str, float]:
    return {level_name(b, len(levels)): float(level) for b, level in enumerate(levels)}


def open_distributions(n_blocks: int) -> dict[str, BaseDistribution]:
    """Distributions [0, 1] for vectors that come from outside a space (seeds on another table)."""
    return {level_name(b, n_blocks): FloatDistribution(0.0, 1.0) for b in range(n_blocks)}


def _check_radius(radius: float) -> None:
    if radius <= 0.0:
        raise InfeasibleError(f"radius: must be positive, got {radius}")


def _check_sparsities(shape: ModelShape, seed: Seed) -> None:
    wanted = shape.params.shape
    if seed.sparsities.shape != wanted:
        raise InfeasibleError(f"seed: sparsities of shape {wanted} needed, got {seed.sparsities.shape}")


def _around(value: float, radius: float, highest: float) -> FloatDistribution:
    """A box of ``radius`` around ``value``, within [0, highest]."""
    return FloatDistribution(max(0.0, value - radius), min(highest, value + radius))
