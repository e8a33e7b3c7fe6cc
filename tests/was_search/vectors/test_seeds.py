from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from was_search.errors import InfeasibleError
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import ModelShape
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import HIGHEST_DESCENDED
from was_search.vectors.greedy import block_path, spend
from was_search.vectors.seeds import baseline_seeds, fisher_seed, point_seed, retarget
from was_search.vectors.table import Table

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 20),) * 3, ((8, 2, 2, 8, 20, 20, 8),) * 3)
BUDGET = SparsityBudget(SHAPE, 0.6)
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
    seeds = [
        *baseline_seeds(SparsityBudget(SHAPE, target), GREEDY),
        fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, target)),
    ]
    assert [seed.name for seed in seeds] == ["uniform", "greedy-uniform", "fisher"]
    for seed in seeds:
        check(seed, target)


def test_what_each_seed_is():
    uniform, greedy = baseline_seeds(BUDGET, GREEDY)
    fisher = fisher_seed(PRICES, DEFAULT_GRID, BUDGET)
    np.testing.assert_allclose(uniform.sparsities, 0.6, rtol=1e-15)
    np.testing.assert_allclose(greedy.levels, 0.6)
    assert np.ptp(greedy.sparsities) > 0.1
    np.testing.assert_array_equal(fisher.sparsities, spend(PRICES, DEFAULT_GRID, SHAPE.params, 0.6))
    assert fisher.table.name == "fisher"


def test_a_block_of_the_fisher_table_depends_on_its_own_prices_alone():
    table = fisher_seed(PRICES, DEFAULT_GRID, BUDGET).table
    changed = PRICES.copy()
    changed[2] *= 100
    again = fisher_seed(changed, DEFAULT_GRID, BUDGET).table
    for b in (0, 1):
        np.testing.assert_array_equal(table.blocks[b].sparsities, again.blocks[b].sparsities)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.949])
def test_a_point_is_a_seed_on_a_table_of_its_own(target):
    point = SparsityBudget(SHAPE, target).onto(np.random.default_rng(1).uniform(0, 1, (3, 7)), HIGHEST_DESCENDED)
    seed = point_seed("descent:0:mean", point, SHAPE)
    check(seed, target)
    np.testing.assert_array_equal(seed.sparsities, point)
    np.testing.assert_allclose(seed.table.sparsities(seed.levels / 2), point / 2, atol=1e-12)  # straight lines
    np.testing.assert_allclose(seed.table.max_levels, HIGHEST_DESCENDED)


def test_a_block_at_its_highest_needs_no_row_above():
    seed = point_seed("full", np.full((3, 7), HIGHEST_DESCENDED), SHAPE)
    assert all(len(block.levels) == 2 for block in seed.table.blocks)


def test_without_a_greedy_table_its_seed_is_left_out():
    assert [seed.name for seed in baseline_seeds(BUDGET, None)] == ["uniform"]


@pytest.mark.parametrize("target", [0.05, 0.4])
def test_a_vector_moved_down_meets_the_budget_and_keeps_differences(target):
    found = fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, 0.5)).sparsities
    moved = retarget(found, SparsityBudget(SHAPE, target))
    assert SHAPE.sparsity(moved) == pytest.approx(target, abs=1e-12)  # float64 sums
    assert np.all((moved >= 0.0) & (moved <= HIGHEST_DESCENDED))
    inside = (moved > 0.0) & (moved < HIGHEST_DESCENDED)
    assert np.ptp((moved - found)[inside]) < 1e-12


@pytest.mark.parametrize("target", [0.6, 0.9, 0.949])
def test_a_vector_moved_up_meets_the_budget_and_keeps_ratios_of_what_is_kept(target):
    found = fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, 0.5)).sparsities
    moved = retarget(found, SparsityBudget(SHAPE, target))
    assert SHAPE.sparsity(moved) == pytest.approx(target, abs=1e-12)  # float64 sums
    assert np.all((moved >= 0.0) & (moved <= HIGHEST_DESCENDED))
    if 1 - (1 - found.max()) * (1 - target) / 0.5 <= HIGHEST_DESCENDED:  # no bound is met
        np.testing.assert_allclose((1 - moved) / (1 - found), (1 - target) / 0.5, rtol=1e-12)
    else:
        inside = moved < HIGHEST_DESCENDED
        scaled = 1 - (1 - found) * (1 - target) / 0.5
        assert np.ptp((moved - scaled)[inside]) < 1e-12  # what the bound cuts off is spread evenly


def test_a_vector_moved_down_is_the_nearest_one():
    """Against scipy's constrained least squares in the parameter-weighted norm."""
    found = fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, 0.5)).sparsities
    weights = (SHAPE.params / SHAPE.params.sum()).ravel()
    solved = minimize(
        lambda s: float(weights @ (s - found.ravel()) ** 2),
        np.full(found.size, 0.3),
        jac=lambda s: 2 * weights * (s - found.ravel()),
        bounds=[(0.0, HIGHEST_DESCENDED)] * found.size,
        constraints=[{"type": "eq", "fun": lambda s: weights @ s - 0.3, "jac": lambda s: weights}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert solved.success
    # SLSQP ends where the objective moves by 1e-14: about 1e-6 in coordinates that weigh a hundredth
    np.testing.assert_allclose(retarget(found, SparsityBudget(SHAPE, 0.3)).ravel(), solved.x, atol=1e-5)


def test_moving_to_where_it_is_changes_nothing():
    found = fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, 0.5)).sparsities
    np.testing.assert_allclose(retarget(found, SparsityBudget(SHAPE, 0.5)), found, atol=1e-13)


def test_a_vector_of_another_shape_is_not_moved():
    with pytest.raises(InfeasibleError, match=r"sparsities: shape must be \(3, 7\), got \(2, 7\)"):
        retarget(np.zeros((2, 7)), SparsityBudget(SHAPE, 0.5))


def test_a_seed_at_a_vector_lies_on_its_own_table():
    found = fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, 0.5)).sparsities
    seed = point_seed("warm", retarget(found, BUDGET), SHAPE)
    check(seed, 0.6)
    assert seed.table.name == "warm"
    np.testing.assert_allclose(seed.table.max_levels, HIGHEST_DESCENDED)
    half = seed.table.sparsities(seed.levels / 2)
    np.testing.assert_allclose(half, seed.sparsities / 2, atol=1e-12)


def test_blocks_at_an_end_need_no_row_of_their_own():
    sparsities = np.full((3, 7), 0.5)
    sparsities[0], sparsities[2] = 0.0, HIGHEST_DESCENDED
    seed = point_seed("warm", sparsities, SHAPE)
    assert [len(block.levels) for block in seed.table.blocks] == [2, 3, 2]
    np.testing.assert_allclose(seed.table.sparsities(seed.levels), sparsities, atol=1e-12)
