from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from was_search.errors import InfeasibleError
from was_search.vectors.budget import project

ROUNDING = 1e-13
"""Levels are below 2 and sums have at most 40 terms: some tens of float64 roundings."""


@st.composite
def problems(draw, max_size=40):
    n = draw(st.integers(1, max_size))
    level = st.floats(-2, 2, width=32)
    raw = draw(st.lists(level, min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(1, 10**9), min_size=n, max_size=n))
    upper = draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n))
    share = draw(st.floats(0, 1))
    most = float(np.dot(weights, upper) / np.sum(weights))
    return np.array(raw), np.array(weights), share * most, np.array(upper)


@given(problems())
def test_the_weighted_mean_is_the_target_and_bounds_hold(problem):
    raw, weights, target, upper = problem
    levels = project(raw, weights, target, 0.0, upper)
    assert abs(np.dot(weights / weights.sum(), levels) - target) < ROUNDING
    assert np.all(levels >= 0.0)
    assert np.all(levels <= upper)


@given(problems())
def test_projecting_twice_changes_nothing(problem):
    raw, weights, target, upper = problem
    once = project(raw, weights, target, 0.0, upper)
    # A coordinate's distance to its bound may be a rounding error, of any sign, once weights differ by 1e9.
    mean = np.dot(weights / weights.sum(), np.abs(project(once, weights, target, 0.0, upper) - once))
    assert mean < ROUNDING


@given(problems())
def test_common_bounds_keep_the_order(problem):
    raw, weights, _, _ = problem
    levels = project(raw, weights, 0.5, 0.0, 0.9)
    order = np.argsort(raw, kind="stable")
    assert np.all(np.diff(levels[order]) >= 0.0)


@given(problems())
def test_optimality_conditions(problem):
    """Nearest point: one shift for all free coordinates; bounds hold back those that would go further."""
    raw, weights, target, upper = problem
    levels = project(raw, weights, target, 0.0, upper)
    moved = levels - raw
    free = (levels > 0.0) & (levels < upper)
    at_low, at_high = levels <= 0.0, (levels >= upper) & (upper > 0.0)
    if free.any():
        shift = moved[free].mean()
        assert np.ptp(moved[free]) < 1e-12
        assert np.all(moved[at_low & (upper > 0.0)] >= shift - 1e-12)
        assert np.all(moved[at_high] <= shift + 1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_nearest_point_against_slsqp(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    raw, weights, upper = rng.uniform(-0.2, 1.2, n), rng.uniform(1, 8, n), rng.uniform(0.5, 1, n)
    share = weights / weights.sum()
    target = float(rng.uniform(0.05, 0.95)) * float(share @ upper)
    found = project(raw, weights, target, 0.0, upper)
    solved = minimize(
        lambda x: share @ (x - raw) ** 2,
        np.full(n, target),
        jac=lambda x: 2 * share * (x - raw),
        bounds=list(zip(np.zeros(n), upper, strict=True)),
        constraints={"type": "eq", "fun": lambda x: share @ x - target, "jac": lambda _: share},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(found, solved.x, atol=2e-5)  # SLSQP's own accuracy: half the digits of ftol


def test_a_point_of_the_budget_stays():
    np.testing.assert_allclose(project([0.2, 0.5, 0.8], [1, 2, 1], 0.5, 0.0, 1.0), [0.2, 0.5, 0.8], atol=1e-15)


@pytest.mark.parametrize(("target", "expected"), [(0.0, [0.0, 0.0]), (0.75, [0.9, 0.6])])
def test_targets_at_the_bounds(target, expected):
    np.testing.assert_allclose(project([0.1, 0.7], [1, 1], target, 0.0, [0.9, 0.6]), expected, atol=1e-15)


@pytest.mark.parametrize("raw", [-3.0, 0.4, 7.0])
def test_one_block_takes_the_target(raw):
    np.testing.assert_allclose(project([raw], [123], 0.6, 0.0, 0.95), [0.6], atol=1e-15)


def test_bounds_without_room():
    np.testing.assert_array_equal(project([0.1, 0.9], [1, 1], 0.5, 0.5, 0.5), [0.5, 0.5])


def test_a_plateau_of_the_mean():
    """Between the shifts -8 and 9 every coordinate sits at a bound; the target is exactly that plateau."""
    np.testing.assert_array_equal(project([9.0, -9.0], [1, 1], 0.5, 0.0, 1.0), [1.0, 0.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_levels_that_are_not_finite(bad):
    with pytest.raises(InfeasibleError, match="raw: levels must be finite"):
        project([0.5, bad], [1, 1], 0.5, 0.0, 1.0)


@pytest.mark.parametrize("target", [-0.01, 0.91, float("nan")])
def test_refuses_a_target_out_of_reach(target):
    match = r"target: must be reachable within the levels' bounds \[0\.1000, 0\.9000\], got"
    with pytest.raises(InfeasibleError, match=match):
        project([0.5, 0.5], [1, 3], target, 0.1, 0.9)
