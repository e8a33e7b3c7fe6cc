"""Budgets of time: projection, the greedy, seeds, spaces and descents on profiles whose launches cost differently."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import NonlinearConstraint, minimize

from tests.doubles.profiles import SINGLE, synthetic_profile
from was_search.decode_time.greedy import spend_time
from was_search.decode_time.profile import LatencyProfile, LaunchCurve
from was_search.decode_time.time_budget import TimeBudget, speedups
from was_search.errors import ConfigError, InfeasibleError
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import ModelShape
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions, descend
from was_search.vectors.greedy import spend
from was_search.vectors.roots import falling_root
from was_search.vectors.seeds import baseline_seeds, fisher_seed, point_seed, retarget
from was_search.vectors.space import SPACES, MonotoneSpace, make_space
from was_search.vectors.table import Table, uniform_table

SHAPE = ModelShape(((64, 64, 64, 64, 64, 64, 160),) * 4, ((64, 16, 16, 64, 160, 160, 64),) * 4)
PARAMS = SHAPE.params
PROFILE = synthetic_profile(SHAPE)
RNG = np.random.default_rng(0)
SCALES = RNG.uniform(0.2, 4.0, (4, 7))
PRICES = SCALES[:, :, None] * (DEFAULT_GRID**2 / (1.02 - DEFAULT_GRID)) * 1e-3
EXACT = 1e-8
"""A share of the time. The promise is 1e-9 of it in the mean, and predictions sum 16 launches."""


def off(budget, vector):
    return abs(budget.profile.seconds(vector) / budget.seconds - 1.0)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    groups = draw(st.sampled_from([None, SINGLE]))
    n = 4 if groups is None else 7
    more = {} if groups is None else {"groups": groups}
    profile = synthetic_profile(
        SHAPE,
        per_weight=tuple(rng.uniform(0.1, 8, n)),
        bend=draw(st.floats(0, 0.95)),
        rest_share=draw(st.floats(0.05, 0.6)),
        **more,
    )
    least, most = speedups(profile)
    share = draw(st.floats(0.02, 0.98))
    return TimeBudget(profile, least + share * (most - least)), rng.normal(0.5, draw(st.floats(0.01, 2)), (4, 7))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_a_projection_meets_the_budget_within_bounds_in_order_and_twice_is_once(problem):
    budget, raw = problem
    found = budget.onto(raw, 0.98)
    assert off(budget, found) < EXACT
    assert found.min() >= 0.0 and found.max() <= 0.98
    order = np.argsort(raw.ravel(), kind="stable")
    assert np.all(np.diff(found.ravel()[order]) >= 0.0)
    np.testing.assert_array_equal(budget.onto(found, 0.98), found)
    free = (found > 0.0) & (found < 0.98)
    if free.any():  # one shift for all that meet no bound
        assert np.ptp((found - raw)[free]) < 1e-12


@settings(max_examples=40, deadline=None)
@given(problems())
def test_more_speed_needs_no_less_of_any_sparsity(problem):
    budget, raw = problem
    least, most = speedups(budget.profile)
    faster = TimeBudget(budget.profile, budget.speedup + 0.5 * (most - budget.speedup))
    assert np.all(faster.onto(raw, 0.98) >= budget.onto(raw, 0.98) - 1e-7)
    assert budget.flat < faster.flat
    assert least < budget.speedup


def test_a_profile_linear_in_parameters_is_a_budget_of_sparsity():
    """With one price for all weights and no bend, time is sparsity."""
    profile = synthetic_profile(SHAPE, per_weight=(1.0,) * 4, bend=0.0)
    flat = np.full((4, 7), 0.6)
    budget = TimeBudget(profile, profile.speedup(profile.seconds(flat)))
    plain = SparsityBudget(SHAPE, 0.6)
    raw = RNG.normal(0.5, 0.3, (4, 7))
    np.testing.assert_allclose(budget.onto(raw, 0.98), plain.onto(raw, 0.98), atol=1e-8)
    np.testing.assert_allclose(budget.tangent(raw, flat), plain.tangent(raw, flat), atol=1e-12)
    np.testing.assert_allclose(budget.spend(PRICES, DEFAULT_GRID), plain.spend(PRICES, DEFAULT_GRID), atol=1e-7)
    assert budget.flat == pytest.approx(0.6, abs=1e-8)
    assert budget.flat_of(raw.clip(0, 1)) == pytest.approx(plain.flat_of(raw.clip(0, 1)), abs=1e-8)


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.2])
def test_the_greedy_is_near_scipys_optimum_and_better_than_spending_sparsity(speedup):
    """Convex prices and curves: the continuous optimum is a lower bound that a grid of 0.025 comes close to."""
    budget = TimeBudget(PROFILE, speedup)
    found = budget.spend(PRICES, DEFAULT_GRID)
    assert off(budget, found) < EXACT

    def price(point):
        return sum(np.interp(point[b, p], DEFAULT_GRID, PRICES[b, p]) for b, p in np.ndindex(4, 7))

    def smooth(x):
        return 1e3 * float((SCALES.ravel() * x**2 / (1.02 - x)).sum()) * 1e-3

    solved = minimize(
        smooth,
        found.ravel(),
        bounds=[(0.0, 0.95)] * 28,
        constraints=NonlinearConstraint(
            lambda x: PROFILE.seconds(np.clip(x, 0, 1).reshape(4, 7)) / budget.seconds,
            -np.inf,
            1.0,
            jac=lambda x: -PROFILE.savings(np.clip(x, 0, 1).reshape(4, 7), 1e-4).ravel()[None] / budget.seconds,
        ),
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    optimum = price(np.clip(solved.x, 0, 0.95).reshape(4, 7))
    assert price(found) <= 1.02 * optimum
    # The vector that spends sparsity best, at the same predicted time.
    low, high = 0.0, 0.94
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high)
            if PROFILE.seconds(spend(PRICES, DEFAULT_GRID, PARAMS, middle)) > budget.seconds
            else (low, middle)
        )
    assert price(found) < 0.95 * price(spend(PRICES, DEFAULT_GRID, PARAMS, high))


def test_the_greedy_passes_over_a_launch_that_saves_nothing_at_first():
    """A step in the curve: only a far raise saves anything, and its price for the second is the best."""
    knots = np.array([0.0, 0.5, 0.6, 1.0])
    curves = [
        LaunchCurve(
            (p,),
            tuple(range(4)),
            knots,
            np.array([1e-5, 1e-5, 0.0, 0.0]) if p == 3 else np.array([1e-7, 5e-8, 4e-8, 0.0]),
        )
        for p in range(7)
    ]
    profile = LatencyProfile(SHAPE, tuple(curves), 1e-6, {"eager": 4.5e-5}, "made up", "float16", "x", 1, 256)
    found = spend_time(PRICES, DEFAULT_GRID, profile, profile.seconds(np.zeros((4, 7))) - 3.9e-5)
    assert found[:, 3].min() > 0.58
    assert np.delete(found, 3, axis=1).max() < 0.4


@pytest.mark.parametrize("speedup", [1.3, 2.0])
def test_seeds_meet_the_budget_and_lie_on_their_tables(speedup):
    budget = TimeBudget(PROFILE, speedup)
    greedy = Table("greedy", fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, 0.5)).table.blocks)
    seeds = [*baseline_seeds(budget, greedy), fisher_seed(PRICES, DEFAULT_GRID, budget)]
    assert [seed.name for seed in seeds] == ["uniform", "greedy-uniform", "fisher"]
    for seed in seeds:
        assert off(budget, seed.sparsities) < EXACT
        np.testing.assert_allclose(seed.table.sparsities(seed.levels), seed.sparsities, atol=1e-9)
    assert np.ptp(seeds[0].sparsities) == 0.0
    assert np.ptp(seeds[1].levels) < 1e-12


@pytest.mark.parametrize("target", [0.2, 0.9])
def test_a_vector_of_another_budget_is_moved_onto_it(target):
    budget = TimeBudget(PROFILE, 1.8)
    moved = retarget(fisher_seed(PRICES, DEFAULT_GRID, SparsityBudget(SHAPE, target)).sparsities, budget)
    assert off(budget, moved) < EXACT
    assert moved.max() <= 0.98


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("speedup", [1.3, 2.0])
def test_sampled_points_of_every_space_meet_the_budget(name, speedup):
    budget = TimeBudget(PROFILE, speedup)
    seed = point_seed("fisher", fisher_seed(PRICES, DEFAULT_GRID, budget).sparsities, SHAPE)
    space = make_space(name, seed, budget, 0.05)
    rng = np.random.default_rng(3)
    for _ in range(10):
        params = {key: rng.uniform(kind.low, kind.high) for key, kind in space.distributions.items()}
        found = space.sparsities(params)
        assert off(budget, found) < EXACT
        np.testing.assert_allclose(space.levels(params), SHAPE.levels(found), atol=1e-9)
    np.testing.assert_allclose(space.sparsities(space.centre), seed.sparsities, atol=1e-6)


def test_the_monotone_baseline_meets_it_too():
    budget = TimeBudget(PROFILE, 1.8)
    space = MonotoneSpace(budget, uniform_table(SHAPE))
    params = {key: kind.high for key, kind in space.distributions.items()}
    assert off(budget, space.sparsities(params)) < EXACT
    assert np.all(np.diff(space.levels(params)) >= 0.0)
    np.testing.assert_allclose(space.sparsities(space.centre), budget.flat, atol=1e-8)


def test_a_descent_ends_on_the_budget_near_the_optimum_there():
    budget = TimeBudget(PROFILE, 1.8)
    weights = PARAMS / PARAMS.sum() * RNG.uniform(0.5, 2.0, (4, 7))
    centre = RNG.uniform(0.1, 0.6, (4, 7))

    def loss(point):
        return float((weights * (point - centre) ** 2).sum())

    start = budget.onto(np.full((4, 7), 0.5), 0.98)
    points = []

    def slopes(point):
        points.append(point)
        return 2 * weights * (point - centre)

    options = DescentOptions(rounds=200, step=0.02, last_step=0.02)
    found = descend(slopes, start, budget, options)
    assert all(off(budget, point) < EXACT for point in [*points, found])
    solved = minimize(
        lambda x: loss(x.reshape(4, 7)),
        start.ravel(),
        bounds=[(0.0, 0.98)] * 28,
        constraints=NonlinearConstraint(
            lambda x: PROFILE.seconds(np.clip(x, 0, 1).reshape(4, 7)) / budget.seconds, -np.inf, 1.0
        ),
        method="SLSQP",
        options={"maxiter": 500},
    )
    best = loss(np.clip(solved.x, 0, 1).reshape(4, 7))
    # Steps have a fixed length, so a descent ends about its last step (0.0004) from the optimum.
    assert loss(found) - best < 0.02 * (loss(start) - best)
    parameters = descend(slopes, start, SparsityBudget(SHAPE, SHAPE.sparsity(found)), options)
    assert loss(parameters) < loss(found)  # less sparsity where it costs: another point, not this budget's
    assert off(budget, parameters) > 1e-4


def test_refuses_speedups_out_of_reach_and_names_the_limits():
    least, most = speedups(PROFILE)
    assert least == pytest.approx(1.0)
    with pytest.raises(
        ConfigError, match=rf"at most {most:.3f} is predicted to be possible .* on made up \(synth.*got 9"
    ):
        TimeBudget(PROFILE, 9.0)
    with pytest.raises(ConfigError, match=r"must be above 1\.000, which the runtime .* nothing skipped .* got 0\.9"):
        TimeBudget(PROFILE, 0.9)
    with pytest.raises(ConfigError, match="got nan"):
        TimeBudget(PROFILE, float("nan"))
    fast = synthetic_profile(SHAPE, dense_seconds=1.5 * PROFILE.seconds(np.zeros((4, 7))))
    with pytest.raises(ConfigError, match=r"must be above 1\.500"):
        TimeBudget(fast, 1.4)
    with pytest.raises(ConfigError, match="sparsity saves no time on"):
        TimeBudget(synthetic_profile(SHAPE, per_weight=(0.0,) * 4), 1.1)


def test_refuses_a_budget_that_a_table_does_not_reach():
    budget = TimeBudget(PROFILE, 2.0)
    low = uniform_table(SHAPE, highest=0.3)
    with pytest.raises(InfeasibleError, match="target_speedup: must be reachable within the levels' bounds"):
        budget.onto_levels(np.full(4, 0.2), low, low.max_levels)
    with pytest.raises(InfeasibleError, match="finite"):
        budget.onto(np.full((4, 7), np.nan), 0.98)
    with pytest.raises(InfeasibleError, match="are not reached at sparsities of"):
        spend_time(PRICES, DEFAULT_GRID, PROFILE, PROFILE.rest_seconds)
    with pytest.raises(InfeasibleError, match="prices: shape must be"):
        budget.spend(PRICES[:, :, :-1], DEFAULT_GRID)
    with pytest.raises(InfeasibleError, match="prices: must be finite"):
        budget.spend(PRICES * np.nan, DEFAULT_GRID)


def test_it_travels_to_workers():
    budget = TimeBudget(PROFILE, 1.8)
    again = pickle.loads(pickle.dumps(budget))
    raw = RNG.uniform(0, 1, (4, 7))
    np.testing.assert_array_equal(again.onto(raw, 0.98), budget.onto(raw, 0.98))
    assert again.identity == budget.identity == {"target speed-up": 1.8, "profile": PROFILE.hash}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_roots_of_falling_steps_and_slopes(seed):
    rng = np.random.default_rng(seed)
    knots = np.sort(rng.uniform(0, 1, 6))
    values = np.sort(rng.uniform(0, 1, 6))[::-1] * rng.choice([1e-6, 1.0, 1e3])
    assume(np.diff(knots).min() > 1e-9)
    value = float(rng.uniform(values[-1], values[0]))
    root = falling_root(lambda x: float(np.interp(x, knots, values)), 0.0, 1.0, value)
    assert float(np.interp(root, knots, values)) == pytest.approx(value, rel=1e-9)


def test_a_large_model_is_fast_enough_for_every_trial():
    """80 blocks: a projection of all 560 sparsities in well under the time of an evaluation."""
    shape = ModelShape(((8192,) * 6 + (28672,),) * 80, ((8192, 1024, 1024, 8192, 28672, 28672, 8192),) * 80)
    budget = TimeBudget(synthetic_profile(shape), 1.8)
    raw = RNG.normal(0.5, 0.2, (80, 7))
    started = time.perf_counter()
    budget.onto(raw, 0.98)
    assert time.perf_counter() - started < 2.0  # 5 ms here; shared machines have been 100 times slower
