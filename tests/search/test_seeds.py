from __future__ import annotations

import numpy as np
import pytest

from was_search.descent import HIGHEST, onto_budget
from was_search.greedy import block_path, spend
from was_search.pricing import DEFAULT_GRID
from was_search.seeds import baseline_seeds, fisher_seed, point_seed
from was_search.shape import ModelShape
from was_search.table import Table

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 20),) * 3, ((8, 2, 2, 8, 20, 20, 8),) * 3)
PRICES = np.random.default_rng(0).exponential(1, (3, 7, 1)) * DEFAULT_GRID**3
GREEDY = Table(
    "greedy",
    tuple(block_path(lambda s, b=b: float(np.sum(s**2) * (b + 1)), SHAPE.params[b]) for b in range(3)),
)


def check(seed, target):
    assert SHAPE.sparsity(seed.sparsities) == pytest.approx(target, abs=1e-13)  # float64 sums
    np.testing.assert_allclose(SHAPE.levels(seed.sparsities), seed.levels, atol=1e-13)
    # The table drops rows that rise by less than 1e-12.
    np.testing.assert_allclose(seed.table.sparsities(seed.levels), seed.sparsities, atol=1e-10)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.949])
def test_every_seed_meets_the_budget_and_lies_on_its_table(target):
    seeds = [*baseline_seeds(SHAPE, target, GREEDY), fisher_seed(PRICES, DEFAULT_GRID, SHAPE, target)]
    assert [seed.name for seed in seeds] == ["uniform", "greedy-uniform", "fisher"]
    for seed in seeds:
        check(seed, target)


def test_what_each_seed_is():
    uniform, greedy = baseline_seeds(SHAPE, 0.6, GREEDY)
    fisher = fisher_seed(PRICES, DEFAULT_GRID, SHAPE, 0.6)
    np.testing.assert_allclose(uniform.sparsities, 0.6, rtol=1e-15)
    np.testing.assert_allclose(greedy.levels, 0.6)
    assert np.ptp(greedy.sparsities) > 0.1
    np.testing.assert_array_equal(fisher.sparsities, spend(PRICES, DEFAULT_GRID, SHAPE.params, 0.6))
    assert fisher.table.name == "fisher"


def test_a_block_of_the_fisher_table_depends_on_its_own_prices_alone():
    table = fisher_seed(PRICES, DEFAULT_GRID, SHAPE, 0.6).table
    changed = PRICES.copy()
    changed[2] *= 100
    again = fisher_seed(changed, DEFAULT_GRID, SHAPE, 0.6).table
    for b in (0, 1):
        np.testing.assert_array_equal(table.blocks[b].sparsities, again.blocks[b].sparsities)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.949])
def test_a_point_is_a_seed_on_a_table_of_its_own(target):
    point = onto_budget(np.random.default_rng(1).uniform(0, 1, (3, 7)), SHAPE, target)
    seed = point_seed("descent:0:mean", point, SHAPE)
    check(seed, target)
    np.testing.assert_array_equal(seed.sparsities, point)
    np.testing.assert_allclose(seed.table.sparsities(seed.levels / 2), point / 2, atol=1e-12)  # straight lines
    np.testing.assert_allclose(seed.table.max_levels, HIGHEST)


def test_a_block_at_its_highest_needs_no_row_above():
    seed = point_seed("full", np.full((3, 7), HIGHEST), SHAPE)
    assert all(len(block.levels) == 2 for block in seed.table.blocks)


def test_without_a_greedy_table_its_seed_is_left_out():
    assert [seed.name for seed in baseline_seeds(SHAPE, 0.6, None)] == ["uniform"]
