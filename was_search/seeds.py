"""The seed vectors of a study: uniform, greedy-uniform, and Fisher-priced with a short descent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from was_search.descent import HIGHEST
from was_search.greedy import path, spend
from was_search.shape import FloatArray, ModelShape
from was_search.table import BlockTable, Table, uniform_table


@dataclass(frozen=True)
class Seed:
    """A vector known before the search, with the table that its sparsities come from."""

    name: str
    table: Table
    levels: FloatArray
    sparsities: FloatArray


def fisher_seed(prices: FloatArray, grid: FloatArray, shape: ModelShape, target: float) -> Seed:
    """The Fisher-priced greedy over all projections, with its table.

    The table holds the seed: restricted to a block, the greedy passes through the block's share of it.

    Args:
        prices: [L, 7, G], nats per token.
        grid: [G] sparsities.
        shape: the model's.
        target: the budget, met exactly.
    """
    sparsities = spend(prices, grid, shape.params, target)
    blocks = tuple(path(prices[b], grid, shape.params[b]) for b in range(shape.n_blocks))
    return Seed("fisher", Table("fisher", blocks), shape.levels(sparsities), sparsities)


def point_seed(name: str, sparsities: FloatArray, shape: ModelShape) -> Seed:
    """``sparsities`` [L, 7] as a seed whose table passes through them: a straight line from nothing dropped to
    this point in every block, and on to :data:`was_search.descent.HIGHEST` everywhere.
    """
    blocks = []
    for row, weights in zip(sparsities, shape.params, strict=True):
        rows = np.stack([np.zeros_like(row), row, np.full_like(row, HIGHEST)])
        levels = (rows * weights).sum(axis=1) / weights.sum()
        keep = np.concatenate([[True], np.diff(levels) > 1e-9])
        blocks.append(BlockTable(levels[keep], rows[keep]))
    return Seed(name, Table(name, tuple(blocks)), shape.levels(sparsities), sparsities)


def baseline_seeds(shape: ModelShape, target: float, greedy: Table | None) -> list[Seed]:
    """The uniform vector, and uniform levels on the greedy table if there is one."""
    uniform = uniform_table(shape)
    flat = np.full(shape.n_blocks, target)
    seeds = [Seed("uniform", uniform, flat, uniform.sparsities(flat))]
    if greedy is not None:
        seeds.append(Seed("greedy-uniform", greedy, flat, greedy.sparsities(flat)))
    return seeds
