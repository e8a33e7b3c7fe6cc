"""The seed vectors of a study: uniform, greedy-uniform, Fisher-priced with a short descent, an earlier study's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from was_search.errors import InfeasibleError
from was_search.shape import FloatArray, ModelShape
from was_search.vectors.budget import Budget
from was_search.vectors.descent import HIGHEST_DESCENDED, DescentOptions
from was_search.vectors.greedy import path
from was_search.vectors.table import BlockTable, Table, uniform_table

GREEDY_STEP = 0.0125
"""Share of a block's parameters that one step of the block-error greedy drops: 30 % of a projection of 4 %."""

PRICES = 4
"""Version of the way in which prices are taken; cached prices of another version are not used."""

SEED_DESCENT = DescentOptions(rounds=8, step=0.04, momentum=0.5, average=0.4, width=0.5)
SEED_SEQUENCES = 16
"""Sequences a round of the seed's descent, which has less inertia and fewer sequences than a search's."""


@dataclass(frozen=True)
class Seed:
    """A vector known before the search, with the table that its sparsities come from."""

    name: str
    table: Table
    levels: FloatArray
    sparsities: FloatArray


def fisher_seed(prices: FloatArray, grid: FloatArray, budget: Budget) -> Seed:
    """The Fisher-priced greedy over all projections, with its table.

    The table holds the seed: restricted to a block, the greedy passes through the block's share of it. Where time and
    not parameters were spent it does not, and the table is that of :func:`point_seed`.

    Args:
        prices: [L, 7, G], nats per token.
        grid: [G] sparsities.
        budget: met exactly.
    """
    shape = budget.shape
    sparsities = budget.spend(prices, grid)
    levels = shape.levels(sparsities)
    table = Table(
        "fisher", tuple(path(prices[b], grid, shape.params[b], groups=shape.groups) for b in range(shape.n_blocks))
    )
    if not np.allclose(table.sparsities(levels), sparsities, rtol=0.0, atol=1e-9):
        return point_seed("fisher", sparsities, shape)
    return Seed("fisher", table, levels, sparsities)


def point_seed(name: str, sparsities: FloatArray, shape: ModelShape) -> Seed:
    """``sparsities`` [L, 7] as a seed whose table passes through them.

    In every block it is a straight line from nothing dropped to this point, and on to
    :data:`was_search.vectors.descent.HIGHEST_DESCENDED` everywhere.
    """
    blocks = []
    for row, weights in zip(sparsities, shape.params, strict=True):
        rows = np.stack([np.zeros_like(row), row, np.full_like(row, HIGHEST_DESCENDED)])
        levels = (rows * weights).sum(axis=1) / weights.sum()
        keep = np.concatenate([[True], np.diff(levels) > 1e-9])
        blocks.append(BlockTable(levels[keep], rows[keep]))
    return Seed(name, Table(name, tuple(blocks)), shape.levels(sparsities), sparsities)


def baseline_seeds(budget: Budget, greedy: Table | None) -> list[Seed]:
    """The uniform vector, and uniform levels on the greedy table if there is one."""
    uniform = uniform_table(budget.shape)
    flat = np.full(budget.shape.n_blocks, budget.flat)
    seeds = [Seed("uniform", uniform, flat, uniform.sparsities(flat))]
    if greedy is not None:
        levels = budget.onto_levels(flat, greedy, greedy.max_levels)
        seeds.append(Seed("greedy-uniform", greedy, levels, greedy.sparsities(levels)))
    return seeds


def retarget(sparsities: FloatArray, budget: Budget) -> FloatArray:
    """``sparsities`` [L, 7] of another budget moved onto ``budget``; float64 [L, 7].

    Up, every projection keeps the same fraction of what it kept: ``s' = 1 - (1 - s) (1 - target) / (1 - mean)``, so
    that what is densest stays so, and little meets the upper bound; for a budget of time, target and mean are the
    flat sparsities that cost as much. Down, all move by the same sparsity but for those that meet a bound: the nearest
    point of the budget.

    Raises:
        InfeasibleError: another shape than the model's, values that are not finite, or a target out of reach.
    """
    moved, wanted = np.asarray(sparsities, np.float64), budget.shape.params.shape
    if moved.shape != wanted:
        raise InfeasibleError(f"sparsities: shape must be {wanted}, got {moved.shape}")
    mean = budget.flat_of(moved)
    if mean < budget.flat:
        moved = 1.0 - (1.0 - moved) * (1.0 - budget.flat) / (1.0 - mean)
    return budget.onto(moved, HIGHEST_DESCENDED)
