"""The seed vectors of a study: uniform, greedy-uniform, Fisher-priced."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from was_search.greedy import path, spend
from was_search.shape import FloatArray, ModelShape
from was_search.table import Table, uniform_table


@dataclass(frozen=True)
class Seed:
    """A vector known before the search, with the table that its sparsities come from."""

    name: str
    table: Table
    levels: FloatArray
    sparsities: FloatArray


def fisher_table(prices: FloatArray, grid: FloatArray, shape: ModelShape) -> Table:
    """Per block, the Fisher-priced greedy restricted to the block. ``prices`` [L, 7, G], ``grid`` [G]."""
    return Table("fisher", tuple(path(prices[b], grid, shape.params[b]) for b in range(shape.n_blocks)))


def make_seeds(shape: ModelShape, target: float, greedy: Table, prices: FloatArray, grid: FloatArray) -> list[Seed]:
    """The three seeds at ``target``, in the order of a study's first slots; each meets the budget exactly."""
    uniform = uniform_table(shape)
    flat = np.full(shape.n_blocks, target)
    priced = spend(prices, grid, shape.params, target)
    return [
        Seed("uniform", uniform, flat, uniform.sparsities(flat)),
        Seed("greedy-uniform", greedy, flat, greedy.sparsities(flat)),
        Seed("fisher", fisher_table(prices, grid, shape), shape.levels(priced), priced),
    ]
