"""Searches that need no Optuna: a ramp with depth, and an evolution with successive halving. Arrays alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from benchmarks.harness.ledger import Ledger, Score
from was_search.errors import ConfigError
from was_search.shape import FloatArray, ModelShape
from was_search.vectors.budget import project
from was_search.vectors.table import Table


@dataclass(frozen=True)
class RampSettings:
    """Slopes tried: a coarse grid over +- ``steepest`` (last block's level less the first's), then Brent's method."""

    steepest: float = 0.5
    grid: int = 9
    refinements: int = 12

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ramp_levels(slope: float, shape: ModelShape, table: Table, target: float) -> FloatArray:
    """Levels [L] linear in depth, the last ``slope`` above the first before projection onto the budget."""
    raw = target + slope * (np.linspace(0.0, 1.0, shape.n_blocks) - 0.5)
    return project(raw, shape.block_params, target, 0.0, table.max_levels)


def linear_ramp(
    ledger: Ledger, shape: ModelShape, table: Table, target: float, settings: RampSettings | None = None
) -> None:
    """Search one parameter, levels linear in depth; ends by itself, with most of a large budget unspent."""
    settings = settings or RampSettings()

    def loss(slope: float) -> float:
        return ledger.evaluate(table.sparsities(ramp_levels(slope, shape, table, target))).loss_nats

    slopes = np.linspace(-settings.steepest, settings.steepest, settings.grid)
    best = int(np.argmin([loss(float(slope)) for slope in slopes]))
    bracket = (slopes[max(best - 1, 0)], slopes[min(best + 1, settings.grid - 1)])
    minimize_scalar(loss, bounds=bracket, method="bounded", options={"maxiter": settings.refinements})


@dataclass(frozen=True)
class EvolutionSettings:
    """The evolution's numbers.

    Attributes:
        offspring: number of offspring of one generation.
        rounds: (share of the sequences, survivors) of each round before the full one, shares rising.
        most_moves: the number of moves of an offspring is the smaller of two draws from 1 .. most_moves.
        least_step: a move's size in sparsity of the smaller unit, log-uniform from here ...
        greatest_step: ... to here.
    """

    offspring: int = 16
    rounds: tuple[tuple[float, int], ...] = ((0.125, 4), (0.25, 2), (0.5, 1))
    most_moves: int = 3
    least_step: float = 0.01
    greatest_step: float = 0.04

    def __post_init__(self) -> None:
        shares, survivors = [share for share, _ in self.rounds], [n for _, n in self.rounds]
        if shares != sorted(set(shares)) or any(not 0.0 < share < 1.0 for share in shares):
            raise ConfigError(f"rounds: shares must rise within (0, 1), got {shares}")
        if [self.offspring, *survivors] != sorted([self.offspring, *survivors], reverse=True) or min(survivors) < 1:
            raise ConfigError(f"rounds: survivors must fall from at most {self.offspring} to at least 1: {survivors}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sequences(self, n: int) -> list[int]:
        """Sequences of ``n`` that an offspring has seen after each round, the full one included."""
        return [*(max(1, round(share * n)) for share, _ in self.rounds), n]

    def generation(self, n: int) -> int:
        """Sequences of ``n`` that one generation costs; the parent costs nothing, its losses are known."""
        seen = [0, *self.sequences(n)]
        alive = [self.offspring, *(survivors for _, survivors in self.rounds)]
        return sum(count * (b - a) for count, a, b in zip(alive, seen[:-1], seen[1:], strict=True))


def evolve(
    ledger: Ledger,
    parent: Score,
    units: FloatArray,
    weights: FloatArray,
    highest: FloatArray,
    sparsities_of: Callable[[FloatArray], FloatArray],
    rng: np.random.Generator,
    settings: EvolutionSettings | None = None,
) -> None:
    """EvoPress's scheme (arXiv 2410.14649, algorithm 1) on sparsities of units, until the ledger is exhausted.

    An offspring moves sparsity between few pairs of units, at equal numbers of parameters, so the budget stays
    exact. Offspring are compared on more and more sequences, drawn anew for every generation, fewer of them in each
    round. Only the last survivor is evaluated in full, and replaces the parent if it is better: the parent has its
    full loss already.

    Args:
        ledger: the run's.
        parent: the full score of ``units``.
        units: sparsities of the units, [n]: blocks, or single projections.
        weights: their parameter counts, [n].
        highest: their greatest sparsities, [n].
        sparsities_of: units [n] -> [L, 7].
        rng: draws moves and sequences.
        settings: the scheme's; the defaults if not given.
    """
    settings = settings or EvolutionSettings()
    counts = settings.sequences(ledger.n_sequences)
    while True:
        order = rng.permutation(ledger.n_sequences)
        offspring = [mutate(units, weights, highest, rng, settings) for _ in range(settings.offspring)]
        scored: list[tuple[FloatArray, Score | None]] = [(child, None) for child in offspring]
        for count, survivors in zip(counts, [*(n for _, n in settings.rounds), 1], strict=True):
            scores = ledger.evaluate_many([(sparsities_of(child), before) for child, before in scored], order[:count])
            found = [(child, score) for (child, _), score in zip(scored, scores, strict=True)]
            found.sort(key=lambda pair: pair[1].loss_nats)
            scored = [*found[:survivors]]
        child, score = scored[0]
        assert score is not None
        if score.loss_nats < parent.loss_nats:
            parent, units = score, child


def mutate(
    units: FloatArray,
    weights: FloatArray,
    highest: FloatArray,
    rng: np.random.Generator,
    settings: EvolutionSettings,
) -> FloatArray:
    """``units`` after a few moves, each between two units; the weighted mean stays as it is to float64 rounding."""
    child = units.copy()
    moves = int(rng.integers(1, settings.most_moves + 1, 2).min())
    done = 0
    while done < moves and len(child) > 1:
        up, down = rng.choice(len(child), 2, replace=False)
        step = np.exp(rng.uniform(np.log(settings.least_step), np.log(settings.greatest_step)))
        moved = min(
            step * min(weights[up], weights[down]),
            (highest[up] - child[up]) * weights[up],
            child[down] * weights[down],
        )
        if moved > 0.0:
            child[up] += moved / weights[up]
            child[down] -= moved / weights[down]
            done += 1
    # A unit taken down to nothing may end a rounding below it.
    return np.clip(child, 0.0, highest)
