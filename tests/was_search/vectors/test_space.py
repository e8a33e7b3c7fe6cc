from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from was_search.errors import ConfigError, InfeasibleError
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import PROJECTIONS, ModelShape
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.seeds import Seed, baseline_seeds, fisher_seed
from was_search.vectors.space import (
    SPACES,
    AdditiveSpace,
    FullSpace,
    LevelSpace,
    MonotoneSpace,
    TemperatureSpace,
    level_name,
    level_params,
    make_space,
    open_distributions,
)
from was_search.vectors.table import BlockTable, Table, uniform_table

L = 12
SHAPE = ModelShape(
    tuple((8, 8, 8, 8, 8, 8, 16 + b) for b in range(L)),
    tuple((8, 2, 2, 8, 16 + b, 16 + b, 8) for b in range(L)),
)


@functools.cache
def seed_of(target: float = 0.6) -> Seed:
    rng = np.random.default_rng(0)
    prices = rng.exponential(1, (L, 7, 1)) * DEFAULT_GRID**2
    return fisher_seed(prices, DEFAULT_GRID, SparsityBudget(SHAPE, target))


@functools.cache
def fisher_space(target: float = 0.6, radius: float = 0.2) -> LevelSpace:
    seed = seed_of(target)
    return LevelSpace(SparsityBudget(SHAPE, target), seed.table, seed.levels, radius)


@functools.cache
def space_of(name: str, target: float = 0.6, radius: float = 0.1):
    return make_space(name, seed_of(target), SparsityBudget(SHAPE, target), radius)


def draw(space, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {name: float(rng.uniform(d.low, d.high)) for name, d in space.distributions.items()}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.6, 0.9, 0.94]))
def test_every_vector_meets_the_budget(seed, target):
    for space in (fisher_space(target), MonotoneSpace(SparsityBudget(SHAPE, target), uniform_table(SHAPE))):
        levels = space.levels(draw(space, seed))
        # Sums of 12 blocks of 7 projections in float64.
        assert SHAPE.sparsity(space.table.sparsities(levels)) == pytest.approx(target, abs=1e-12)


@given(st.integers(0, 10**6))
def test_monotone_levels_rise_with_depth(seed):
    space = MonotoneSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE))
    assert np.all(np.diff(space.levels(draw(space, seed))) >= 0.0)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.94])
def test_the_centre_is_the_seed(target):
    """A seed on the edge of its table, such as at 0.94, still lies in the space: samplers are told of it."""
    space = fisher_space(target)
    np.testing.assert_allclose(space.levels(space.centre), space.seed_levels, atol=1e-14)
    for name, distribution in space.distributions.items():
        assert distribution._contains(space.centre[name])


def test_the_monotone_centre_is_uniform():
    space = MonotoneSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE))
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
        LevelSpace(SparsityBudget(shape, 0.6), uniform_table(shape), np.array([0.6])),
        MonotoneSpace(SparsityBudget(shape, 0.6), uniform_table(shape)),
    ):
        assert list(space.distributions) == ["level_0"]
        np.testing.assert_allclose(space.levels({"level_0": 0.45}), [0.6], atol=1e-15)


def test_names_sort_by_depth():
    names = [level_name(b, 101) for b in range(101)]
    assert names == sorted(names)
    assert names[7] == "level_007"
    assert list(open_distributions(3)) == ["level_0", "level_1", "level_2"]
    assert all((d.low, d.high) == (0.0, 1.0) for d in open_distributions(3).values())
    names = list(MonotoneSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE)).distributions)
    assert names == ["level_00", *(f"rise_{b:02d}" for b in range(1, L))]


@pytest.mark.parametrize("radius", [0.0, -0.1])
def test_refuses_a_radius_that_is_not_positive(radius):
    with pytest.raises(InfeasibleError, match="radius: must be positive, got"):
        fisher_space(radius=radius)


def test_refuses_a_target_above_the_table():
    space = MonotoneSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE, highest=0.5))
    with pytest.raises(InfeasibleError, match="target: must be reachable"):
        space.levels(space.centre)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.6, 0.94]), st.sampled_from(SPACES))
def test_sparsities_meet_the_budget_in_every_space(seed, target, name):
    space = space_of(name, target)
    params = draw(space, seed)
    sparsities = space.sparsities(params)
    # Sums of 84 projections in float64.
    assert SHAPE.sparsity(sparsities) == pytest.approx(target, abs=1e-12)
    assert sparsities.min() >= 0.0 and sparsities.max() <= 0.99
    np.testing.assert_allclose(space.levels(params), SHAPE.levels(sparsities), atol=1e-12)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.94])
@pytest.mark.parametrize("name", SPACES)
def test_the_centre_of_every_space_is_the_seed(name, target):
    space, seed = space_of(name, target), seed_of(target)
    # The table interpolates between its rows, so it gives the seed to rounding.
    np.testing.assert_allclose(space.sparsities(space.centre), seed.sparsities, atol=1e-10)
    if name in ("additive", "full"):
        np.testing.assert_allclose(space.sparsities(space.centre), seed.sparsities, atol=1e-15)
    assert list(space.distributions) == list(space.centre)
    assert all(space.distributions[key]._contains(value) for key, value in space.centre.items())
    assert space.locate(seed) == space.centre


@pytest.mark.parametrize("name", SPACES)
def test_parameters_sort_by_depth_and_projection(name):
    names = list(space_of(name).distributions)
    assert names == sorted(names)
    assert len(names) == {"levels": L, "temperature": L + 1, "additive": L + 7, "full": 7 * L}[name]


def test_names_say_block_and_projection():
    assert list(space_of("additive").distributions)[L - 1 : L + 2] == ["block_11", "kind_0_q", "kind_1_k"]
    assert list(space_of("full").distributions)[6:8] == ["block_00_6_down", "block_01_0_q"]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_temperature_scales_a_blocks_contrasts(temperature):
    """Where no projection meets a bound, by the definition; the levels stay as they are."""
    space = TemperatureSpace(SparsityBudget(SHAPE, 0.5), gentle_table(), np.full(L, 0.5))
    params = {**level_params(np.linspace(0.47, 0.53, L)), "temperature": temperature}
    levels = space.levels(params)
    found = space.sparsities(params)
    split = gentle_table().sparsities(levels)
    np.testing.assert_allclose(found, levels[:, None] + temperature * (split - levels[:, None]), atol=1e-14)
    np.testing.assert_allclose(SHAPE.levels(found), levels, atol=1e-14)


def gentle_table() -> Table:
    """Splits of +-0.1 around the level at most."""
    blocks = []
    for b in range(L):
        contrast = np.random.default_rng(b).uniform(-0.1, 0.1, 7)
        contrast -= (contrast * SHAPE.params[b]).sum() / SHAPE.block_params[b]
        rows = np.stack([np.zeros(7), 0.3 + contrast, 0.7 + contrast, np.full(7, 0.95)])
        blocks.append(BlockTable(np.array([0.0, 0.3, 0.7, 0.95]), rows))
    return Table("gentle", tuple(blocks))


def test_a_high_temperature_stays_within_the_bounds():
    space = space_of("temperature", 0.6)
    found = space.sparsities({**space.centre, "temperature": 2.0})
    assert found.min() == 0.0 and found.max() <= 0.99
    np.testing.assert_allclose(SHAPE.levels(found), seed_of(0.6).levels, atol=1e-12)


def test_additive_offsets_add_up():
    """Without a bound in reach: seed + block + kind, less one shift of all."""
    seed = inner_seed()
    space = AdditiveSpace(SparsityBudget(SHAPE, 0.6), seed, 0.05)
    params = draw(space, 3)
    offsets = np.array(list(params.values()))
    moved = space.sparsities(params) - seed.sparsities - offsets[:L, None] - offsets[None, L:]
    np.testing.assert_allclose(moved, moved[0, 0], atol=1e-14)


def test_an_offset_of_all_blocks_or_of_all_kinds_does_nothing():
    space = AdditiveSpace(SparsityBudget(SHAPE, 0.6), inner_seed(), 0.05)
    params = draw(space, 4)
    for prefix in ("block", "kind"):
        shifted = {name: value + 0.01 * name.startswith(prefix) for name, value in params.items()}
        np.testing.assert_allclose(space.sparsities(shifted), space.sparsities(params), atol=1e-14)


def test_a_common_shift_of_all_projections_does_nothing():
    space = FullSpace(SparsityBudget(SHAPE, 0.6), inner_seed(), 0.05)
    params = draw(space, 5)
    shifted = {name: value + 0.01 for name, value in params.items()}
    np.testing.assert_allclose(space.sparsities(shifted), space.sparsities(params), atol=1e-14)


def inner_seed() -> Seed:
    """A seed far from all bounds."""
    uniform = uniform_table(SHAPE)
    raw = np.random.default_rng(0).uniform(-0.1, 0.1, (L, 7))
    sparsities = 0.6 + raw - SHAPE.sparsity(raw)
    return Seed("inner", uniform, SHAPE.levels(sparsities), sparsities)


def test_the_full_box_is_the_seed_and_the_radius():
    space, seed = space_of("full", 0.6, 0.1), seed_of(0.6)
    for distribution, value in zip(space.distributions.values(), seed.sparsities.ravel(), strict=True):
        assert distribution.low == max(0.0, value - 0.1)
        assert distribution.high == min(0.99, value + 0.1)


def test_seeds_are_located_where_a_space_holds_them():
    uniform, greedy = baseline_seeds(SparsityBudget(SHAPE, 0.6), Table("greedy", uniform_table(SHAPE).blocks))
    assert space_of("levels").locate(uniform) is None
    assert MonotoneSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE)).locate(uniform) is None
    assert space_of("temperature").locate(greedy) is None
    assert space_of("additive").locate(uniform) is None
    for name in ("temperature", "full"):
        params = space_of(name).locate(uniform)
        np.testing.assert_allclose(space_of(name).sparsities(params), 0.6, atol=1e-12)
    around_uniform = make_space("levels", uniform, SparsityBudget(SHAPE, 0.6), 0.05)
    assert around_uniform.locate(uniform) == around_uniform.centre


@pytest.mark.parametrize("name", SPACES)
def test_every_space_refuses_a_radius_that_is_not_positive(name):
    with pytest.raises(InfeasibleError, match=r"radius: must be positive, got 0\.0"):
        make_space(name, seed_of(), SparsityBudget(SHAPE, 0.6), 0.0)


@pytest.mark.parametrize("kind", [AdditiveSpace, FullSpace])
def test_refuses_a_seed_of_another_shape(kind):
    seed = seed_of()
    with pytest.raises(InfeasibleError, match=r"seed: sparsities of shape \(12, 7\) needed, got \(11, 7\)"):
        kind(SparsityBudget(SHAPE, 0.6), Seed("short", seed.table, seed.levels[1:], seed.sparsities[1:]))


def test_refuses_a_temperature_range_without_the_centre():
    with pytest.raises(InfeasibleError, match=r"hottest: must be at least 1, the table's own split, got 0\.5"):
        TemperatureSpace(SparsityBudget(SHAPE, 0.6), seed_of().table, seed_of().levels, hottest=0.5)


def test_refuses_an_unknown_space():
    with pytest.raises(ConfigError, match="space: must be one of levels, temperature, additive, full, got 'blocks'"):
        make_space("blocks", seed_of(), SparsityBudget(SHAPE, 0.6), 0.05)


def test_numbers_of_projections_follow_their_order():
    names = [name.removeprefix("kind_") for name in space_of("additive").distributions if name.startswith("kind")]
    assert names == [f"{p}_{name}" for p, name in enumerate(PROJECTIONS)]
