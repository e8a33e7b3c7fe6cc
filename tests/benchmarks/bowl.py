"""A synthetic problem whose best vector is known."""

from __future__ import annotations

from functools import cache

import numpy as np

from was_search.shape import ModelShape
from was_search.vectors.budget import SparsityBudget, project
from was_search.vectors.seeds import Seed, baseline_seeds, fisher_seed
from was_search.vectors.table import BlockTable, Table

L = 6
SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 16),) * L, ((8, 4, 4, 8, 16, 16, 8),) * L)
TARGET = 0.6
N_SEQUENCES = 16
TOKENS = 10


class Bowl:
    """Losses ``2 + sum of squares to the best vector + noise of the sequence``; the noise is the same for all."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        raw = 0.6 + rng.uniform(-0.1, 0.1, (L, 7)) + 0.1 * np.array([1, -1, 0, 0, 1, -1])[:, None]
        self.best = project(raw.ravel(), SHAPE.params.ravel(), TARGET, 0.0, 0.99).reshape(L, 7)
        self.noise = rng.normal(0, 0.05, N_SEQUENCES)
        self.noise -= self.noise.mean()
        self.calls: list[int] = []

    def loss(self, sparsities: np.ndarray) -> float:
        return 2.0 + float(np.square(sparsities - self.best).sum())

    def losses(self, asked: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        self.calls += [len(sequences) for _, sequences in asked]
        return [self.loss(sparsities) + self.noise[sequences] for sparsities, sequences in asked]


def seeds() -> list[Seed]:
    """Uniform, a greedy table with a split of its own, and a Fisher seed of other prices."""
    return list(_seeds())


@cache
def _seeds() -> list[Seed]:
    tilt = np.array([0.05, -0.05, 0.05, -0.05, 0.02, -0.02, 0.0])
    tilt -= (tilt * SHAPE.params[0]).sum() / SHAPE.block_params[0]
    rows = np.stack([np.zeros(7), 0.4 + tilt, 0.8 + tilt, np.full(7, 0.95)])
    greedy = Table("greedy", (BlockTable(np.array([0.0, 0.4, 0.8, 0.95]), rows),) * L)
    grid = np.linspace(0.0, 0.95, 20)
    prices = np.random.default_rng(1).uniform(0.8, 1.2, (L, 7, 1)) * SHAPE.params[..., None] * grid**2
    return [
        *baseline_seeds(SparsityBudget(SHAPE, TARGET), greedy),
        fisher_seed(prices, grid, SparsityBudget(SHAPE, TARGET)),
    ]
