"""The seed vectors of a study: uniform, greedy-uniform, Fisher-priced."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from was_search.greedy import path, spend
from was_search.shape import FloatArray, ModelShape
from was_search.table import Table, uniform_table

REPRICE_RADIUS = 0.07
"""How far from the point where they were taken sparse prices are trusted, in sparsity."""


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
