from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.spatial import ConvexHull

from was_search.errors import InfeasibleError
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import ModelShape
from was_search.vectors.greedy import block_path, convex_hull, path, spend
from was_search.vectors.table import Table

GRID = np.array([0.0, 0.1, 0.25, 0.5, 0.6, 0.9])


def problem(seed: int, L: int = 2, grid: np.ndarray = GRID) -> tuple[np.ndarray, ModelShape]:
    """Rising prices that are not convex, as sampled ones are not, and a grouped-query shape."""
    rng = np.random.default_rng(seed)
    prices = np.zeros((L, 7, len(grid)))
    prices[..., 1:] = np.cumsum(rng.exponential(rng.uniform(0.1, 3, (L, 7, 1)), (L, 7, len(grid) - 1)), axis=-1)
    widths = [int(w) for w in rng.integers(2, 9, 3)]
    d, kv, ff = 2 * widths[0], widths[1], 3 * widths[2]
    return prices, ModelShape(((d, d, d, d, d, d, ff),) * L, ((d, kv, kv, d, ff, ff, d),) * L)


def hull_cost(prices: np.ndarray, grid: np.ndarray, sparsities: np.ndarray) -> float:
    """Cost of sparsities on the lower hulls, the hulls by brute force over all chords."""
    total = 0.0
    for curve, s in zip(prices.reshape(-1, len(grid)), sparsities.ravel(), strict=True):
        chords = [
            curve[i] + (curve[j] - curve[i]) * (s - grid[i]) / (grid[j] - grid[i])
            for i, j in itertools.combinations(range(len(grid)), 2)
            if grid[i] - 1e-12 <= s <= grid[j] + 1e-12
        ]
        total += min(chords)
    return total


def linear_program(prices: np.ndarray, grid: np.ndarray, params: np.ndarray, target: float) -> float:
    """The least cost of convex combinations of grid points per curve that meet the target."""
    curves = prices.reshape(-1, len(grid))
    n = len(curves)
    each = np.kron(np.eye(n), np.ones(len(grid)))
    budget = np.kron(params.ravel(), grid) / params.sum()
    solved = linprog(
        curves.ravel(),
        A_eq=np.vstack([each, budget]),
        b_eq=np.append(np.ones(n), target),
        bounds=(0, 1),
        method="highs",
    )
    assert solved.status == 0
    return float(solved.fun)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 0.9))
def test_spend_against_a_linear_program(seed, target):
    prices, shape = problem(seed)
    found = spend(prices, GRID, shape.params, target)
    assert shape.sparsity(found) == pytest.approx(target, abs=1e-13)
    assert np.all((found >= 0) & (found <= 0.9))
    # HiGHS solves to a feasibility of 1e-7, times slopes of up to about 50.
    assert hull_cost(prices, GRID, found) == pytest.approx(linear_program(prices, GRID, shape.params, target), abs=1e-5)


def test_spend_is_no_worse_than_any_point_of_the_grid():
    grid = np.array([0.0, 0.4, 0.8])
    prices, shape = problem(5, L=1, grid=grid)
    for choice in itertools.product(range(3), repeat=7):
        point = grid[list(choice)][None]
        cost = prices[0, np.arange(7), list(choice)].sum()
        found = spend(prices, grid, shape.params, min(shape.sparsity(point), 0.8))
        assert hull_cost(prices, grid, found) <= cost + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 0.9))
def test_the_tables_at_the_seed_levels_are_what_was_spent(seed, target):
    prices, shape = problem(seed, L=3)
    spent = spend(prices, GRID, shape.params, target)
    table = Table("fisher", tuple(path(prices[b], GRID, shape.params[b]) for b in range(3)))
    # The table drops rows that rise by less than 1e-12 of the block; a small projection is some tens of that.
    np.testing.assert_allclose(table.sparsities(shape.levels(spent)), spent, atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_tables_hold_what_was_spent(seed, share):
    prices, shape = problem(seed, L=3)
    prices -= np.random.default_rng(seed).uniform(0, 3) * GRID  # such as at a sparse point, where some fall
    spent = spend(prices, GRID, shape.params, 0.9 * share)
    table = Table("fisher", tuple(path(prices[b], GRID, shape.params[b]) for b in range(3)))
    np.testing.assert_allclose(table.sparsities(shape.levels(spent)), spent, atol=1e-10)
    np.testing.assert_allclose(table.max_levels, 0.9)
    np.testing.assert_array_equal(table.sparsities(np.zeros(3)), np.zeros((3, 7)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.01, 0.89))
def test_path_is_spend_restricted_to_the_block(seed, level):
    prices, shape = problem(seed, L=1)
    table = path(prices[0], GRID, shape.params[0])
    np.testing.assert_allclose(table.row(level), spend(prices, GRID, shape.params, level)[0], atol=1e-12)
    assert table.levels[-1] == pytest.approx(0.9, abs=1e-15)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=7, max_size=7), st.floats(0, 0.95))
def test_prices_on_a_line_meet_the_target(slopes, target):
    """Collinear points: rounding alone decides which are corners, and may price a later segment lower."""
    prices = np.asarray(slopes)[None, :, None] * DEFAULT_GRID
    params = np.array([[3, 1, 1, 3, 7, 7, 7]])
    found = spend(prices, DEFAULT_GRID, params, target)
    assert (found * params).sum() / params.sum() == pytest.approx(target, abs=1e-13)
    table = path(prices[0], DEFAULT_GRID, params[0])
    np.testing.assert_allclose(table.row(target), found[0], atol=1e-12)


def test_equal_prices_rise_together_in_the_grid():
    prices = np.tile(GRID**2, (1, 7, 1))
    found = spend(prices, GRID, np.ones((1, 7), int), 0.25)
    np.testing.assert_allclose(found, 0.25, atol=1e-15)


def test_prices_that_fall_are_taken_first():
    prices = np.zeros((1, 7, 3))
    prices[0, :, 1:] = [1.0, 2.0]
    prices[0, 4, 1:] = [-1.0, -1.0]
    found = spend(prices, np.array([0.0, 0.5, 0.9]), np.ones((1, 7), int), 0.5 / 7)
    np.testing.assert_allclose(found, [[0, 0, 0, 0, 0.5, 0, 0]], atol=1e-15)


@pytest.mark.parametrize("target", [0.0, 0.9])
def test_targets_at_the_ends(target):
    prices, shape = problem(0)
    np.testing.assert_allclose(spend(prices, GRID, shape.params, target), target, atol=1e-15)


@given(st.integers(0, 10**6), st.integers(3, 30))
def test_hull_against_scipy(seed, n):
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.uniform(0, 1, n)), rng.uniform(0, 1, n)
    # Points high above the ends make scipy's full hull contain exactly the lower one besides them.
    points = np.column_stack([np.append(x, [x[0], x[-1]]), np.append(y, [9.0, 9.0])])
    expected = sorted(i for i in ConvexHull(points).vertices if i < n)
    assert convex_hull(x, y).tolist() == expected


def test_hull_drops_points_on_a_line_and_keeps_the_ends():
    assert convex_hull(np.arange(5.0), np.arange(5.0)).tolist() == [0, 4]
    assert convex_hull(np.array([0.0]), np.array([0.0])).tolist() == [0]


def test_block_path_takes_the_cheapest_step_each_time():
    params = np.array([4, 1, 1, 4, 6, 6, 6])
    weights = np.array([3.0, 0.2, 0.5, 2.0, 1.0, 4.0, 0.7])
    error = lambda s: float(weights @ np.asarray(s) ** 2)  # noqa: E731
    step = 0.1
    table = block_path(error, params, step=step, highest=0.9)
    for before, after in itertools.pairwise(table.sparsities):
        moved = int(np.argmax(after - before))
        options = {}
        for p in range(7):
            raised = before.copy()
            raised[p] = min(0.9, before[p] + step * params.sum() / params[p])
            if raised[p] > before[p]:
                options[p] = (error(raised) - error(before)) / (params[p] * (raised[p] - before[p]))
        assert options[moved] == min(options.values())
        assert np.count_nonzero(after != before) == 1
    np.testing.assert_allclose(table.sparsities[-1], 0.9)
    np.testing.assert_allclose((table.sparsities * params).sum(1) / params.sum(), table.levels, atol=1e-15)


def test_block_path_drops_equal_numbers_of_parameters():
    params = np.array([4, 1, 1, 4, 6, 6, 6])
    table = block_path(lambda s: float(np.sum(s)), params, step=0.05, highest=0.9)
    steps = np.diff(table.levels)
    assert np.all(steps < 0.05 + 1e-12)
    assert np.count_nonzero(steps < 0.05 - 1e-12) <= 7  # the last step of each projection


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_block_path_refuses_an_error_that_is_not_finite(bad):
    with pytest.raises(InfeasibleError, match="block error: must be finite, got"):
        block_path(lambda s: bad if s[3] > 0 else 0.0, np.ones(7, int))


@pytest.mark.parametrize("target", [-0.1, 0.91, float("nan")])
def test_refuses_a_target_beyond_the_grid(target):
    prices, shape = problem(0)
    with pytest.raises(InfeasibleError, match=r"target: must be in \[0\.0000, 0\.9000\], got"):
        spend(prices, GRID, shape.params, target)


def test_refuses_bad_prices_and_grids():
    prices, shape = problem(0)
    with pytest.raises(InfeasibleError, match=r"prices: shape must be \(2, 7, 5\), got \(2, 7, 6\)"):
        spend(prices, GRID[:-1], shape.params, 0.5)
    for grid in (GRID[::-1], GRID + 0.01, np.full(6, np.nan), [0.0, 0.1, np.nan, 0.3, 0.4, 0.5]):
        with pytest.raises(InfeasibleError, match="grid: must rise strictly from 0"):
            path(prices[0], grid, shape.params[0])
    prices[0, 0, 2] = np.inf
    with pytest.raises(InfeasibleError, match="prices: must be finite; the model's gradients overflow"):
        spend(prices, GRID, shape.params, 0.5)
