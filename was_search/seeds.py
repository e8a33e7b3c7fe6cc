"""The seed vectors of a study: uniform, greedy-uniform, Fisher-priced, and the winner of an earlier study."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from was_search.budget import project
from was_search.errors import InfeasibleError
from was_search.greedy import path, spend
from was_search.shape import N_PROJECTIONS, FloatArray, ModelShape
from was_search.table import BlockTable, Table, uniform_table

REPRICE_RADIUS = 0.07
"""How far from the point where they were taken sparse prices are trusted, in sparsity."""

HIGHEST = 0.99
"""No projection is asked to drop more than this share of its inputs."""


@dataclass(frozen=True)
class Seed:
    """A vector known before the search, with the table that its sparsities come from."""

    name: str
    table: Table
    levels: FloatArray
    sparsities: FloatArray


def fisher_seed(
    prices: FloatArray,
    grid: FloatArray,
    shape: ModelShape,
    target: float,
    *,
    around: FloatArray | None = None,
    radius: float = REPRICE_RADIUS,
) -> Seed:
    """The Fisher-priced greedy over all projections, with its table.

    The table holds the seed: restricted to a block, the greedy passes through the block's share of it.

    Args:
        prices: [L, 7, G], nats per token.
        grid: [G] sparsities.
        shape: the model's.
        target: the budget, met exactly.
        around: prices hold near this point [L, 7] only, where they were taken; None trusts them everywhere.
        radius: how far from it they are trusted.
    """
    lower = np.zeros(shape.params.shape) if around is None else np.asarray(around) - radius
    upper = np.ones(shape.params.shape) if around is None else np.asarray(around) + radius
    sparsities = spend(prices, grid, shape.params, target, lower=lower, upper=upper)
    blocks = tuple(
        path(prices[b], grid, shape.params[b], lower=lower[b], upper=upper[b]) for b in range(shape.n_blocks)
    )
    return Seed("fisher", Table("fisher", blocks), shape.levels(sparsities), sparsities)


def baseline_seeds(shape: ModelShape, target: float, greedy: Table) -> list[Seed]:
    """The uniform vector, and uniform levels on the greedy table."""
    uniform = uniform_table(shape)
    flat = np.full(shape.n_blocks, target)
    return [
        Seed("uniform", uniform, flat, uniform.sparsities(flat)),
        Seed("greedy-uniform", greedy, flat, greedy.sparsities(flat)),
    ]


def retarget(sparsities: FloatArray, shape: ModelShape, target: float) -> FloatArray:
    """The point of the budget ``target`` nearest to ``sparsities`` [L, 7] within [0, 0.99]; float64 [L, 7].

    Nearest in the square norm weighted by parameters, so all projections move by the same sparsity but for those
    that meet a bound: differences between projections, which are what a search found out, are kept.

    Raises:
        InfeasibleError: another shape than the model's, values that are not finite, or a target out of reach.
    """
    wanted = np.asarray(sparsities, np.float64)
    if wanted.shape != shape.params.shape:
        raise InfeasibleError(f"sparsities: shape must be {shape.params.shape}, got {wanted.shape}")
    moved = project(wanted.ravel(), shape.params.ravel(), target, 0.0, HIGHEST)
    return moved.reshape(wanted.shape)


def table_through(name: str, sparsities: FloatArray, shape: ModelShape) -> Table:
    """A table whose blocks go from nothing dropped in a straight line through their row of ``sparsities`` to 0.99.

    A block's row is left out where it is one of the two ends, since levels must rise.
    """
    levels = shape.levels(sparsities)
    blocks = []
    for b in range(shape.n_blocks):
        rows = [np.zeros(N_PROJECTIONS), sparsities[b], np.full(N_PROJECTIONS, HIGHEST)]
        heights = [0.0, float(levels[b]), HIGHEST]
        if not 1e-12 < heights[1] < HIGHEST - 1e-12:
            del rows[1], heights[1]
        blocks.append(BlockTable(np.array(heights), np.stack(rows)))
    return Table(name, tuple(blocks))


def seed_at(name: str, sparsities: FloatArray, shape: ModelShape) -> Seed:
    """A seed at ``sparsities`` [L, 7] as they stand, on a table made for it."""
    return Seed(name, table_through(name, sparsities, shape), shape.levels(sparsities), sparsities)
