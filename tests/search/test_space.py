from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from was_search.errors import InfeasibleError
from was_search.pricing import DEFAULT_GRID
from was_search.seeds import fisher_seed
from was_search.shape import ModelShape
from was_search.space import LevelSpace, MonotoneSpace, level_name, level_params, open_distributions
from was_search.table import uniform_table

L = 12
SHAPE = ModelShape(
    tuple((8, 8, 8, 8, 8, 8, 16 + b) for b in range(L)),
    tuple((8, 2, 2, 8, 16 + b, 16 + b, 8) for b in range(L)),
)


@functools.cache
def fisher_space(target: float = 0.6, radius: float = 0.2) -> LevelSpace:
    rng = np.random.default_rng(0)
    prices = rng.exponential(1, (L, 7, 1)) * DEFAULT_GRID**2
    seed = fisher_seed(prices, DEFAULT_GRID, SHAPE, target)
    return LevelSpace(SHAPE, seed.table, seed.levels, target, radius)


def draw(space, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {name: float(rng.uniform(d.low, d.high)) for name, d in space.distributions.items()}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.6, 0.9, 0.94]))
def test_every_vector_meets_the_budget(seed, target):
    for space in (fisher_space(target), MonotoneSpace(SHAPE, uniform_table(SHAPE), target)):
        levels = space.levels(draw(space, seed))
        # Sums of 12 blocks of 7 projections in float64.
        assert SHAPE.sparsity(space.table.sparsities(levels)) == pytest.approx(target, abs=1e-12)


@given(st.integers(0, 10**6))
def test_monotone_levels_rise_with_depth(seed):
    space = MonotoneSpace(SHAPE, uniform_table(SHAPE), 0.6)
    assert np.all(np.diff(space.levels(draw(space, seed))) >= 0.0)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.94])
def test_the_centre_is_the_seed(target):
    """A seed on the edge of its table, such as at 0.94, still lies in the space: samplers are told of it."""
    space = fisher_space(target)
    np.testing.assert_allclose(space.levels(space.centre), space.seed_levels, atol=1e-14)
    for name, distribution in space.distributions.items():
        assert distribution._contains(space.centre[name])


def test_the_monotone_centre_is_uniform():
    space = MonotoneSpace(SHAPE, uniform_table(SHAPE), 0.6)
    np.testing.assert_allclose(space.levels(space.centre), 0.6, atol=1e-15)
    assert all(space.distributions[name]._contains(value) for name, value in space.centre.items())


def test_the_box_is_the_seed_and_the_radius_within_the_table():
    space = fisher_space(0.6, radius=0.3)
    for b, level in enumerate(space.seed_levels):
        distribution = space.distributions[level_name(b, L)]
        assert distribution.low == max(0.0, level - 0.3)
        assert distribution.high == min(space.table.max_levels[b], level + 0.3)


def test_raw_levels_shift_together():
    """Without a bound in reach, projection keeps the differences between blocks."""
    space = fisher_space(0.5, radius=0.01)
    raw = level_params(space.seed_levels + np.linspace(-0.01, 0.01, L))
    moved = space.levels(raw) - np.array(list(raw.values()))
    np.testing.assert_allclose(moved, moved[0], atol=1e-14)


def test_one_block():
    shape = ModelShape(((8,) * 7,), ((8,) * 7,))
    for space in (
        LevelSpace(shape, uniform_table(shape), np.array([0.6]), 0.6),
        MonotoneSpace(shape, uniform_table(shape), 0.6),
    ):
        assert list(space.distributions) == ["level_0"]
        np.testing.assert_allclose(space.levels({"level_0": 0.45}), [0.6], atol=1e-15)


def test_names_sort_by_depth():
    names = [level_name(b, 101) for b in range(101)]
    assert names == sorted(names)
    assert names[7] == "level_007"
    assert list(open_distributions(3)) == ["level_0", "level_1", "level_2"]
    assert all((d.low, d.high) == (0.0, 1.0) for d in open_distributions(3).values())
    names = list(MonotoneSpace(SHAPE, uniform_table(SHAPE), 0.6).distributions)
    assert names == ["level_00", *(f"rise_{b:02d}" for b in range(1, L))]


@pytest.mark.parametrize("radius", [0.0, -0.1])
def test_refuses_a_radius_that_is_not_positive(radius):
    with pytest.raises(InfeasibleError, match="radius: must be positive, got"):
        fisher_space(radius=radius)


def test_refuses_a_target_above_the_table():
    space = MonotoneSpace(SHAPE, uniform_table(SHAPE, highest=0.5), 0.6)
    with pytest.raises(InfeasibleError, match="target: must be reachable"):
        space.levels(space.centre)
