from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from was_search.errors import InfeasibleError
from was_search.shape import ModelShape
from was_search.vectors.table import BlockTable, Table, uniform_table

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 20), (8,) * 7), ((8, 2, 2, 8, 20, 20, 8), (4,) * 7))


def staircase(params: np.ndarray) -> BlockTable:
    """One projection after the other is raised to 0.9."""
    rows = np.array([[0.9 if p < i else 0.0 for p in range(7)] for i in range(8)])
    return BlockTable((rows * params).sum(axis=1) / params.sum(), rows)


TABLE = Table("greedy", tuple(staircase(params) for params in SHAPE.params))


@given(st.floats(0, 0.9), st.floats(0, 0.9))
def test_the_weighted_mean_of_a_row_is_its_level(a, b):
    levels = np.minimum([a, b], TABLE.max_levels)
    np.testing.assert_allclose(SHAPE.levels(TABLE.sparsities(levels)), levels, atol=1e-14)  # float64 sums of 7


@given(st.floats(0, 0.9), st.floats(0, 0.9))
def test_sparsities_rise_with_the_level(a, b):
    low, high = sorted((a, b))
    assert np.all(TABLE.blocks[0].row(min(low, 0.89)) <= TABLE.blocks[0].row(min(high, 0.89)))


def test_between_two_rows_only_the_turned_projection_moves():
    block = TABLE.blocks[1]  # equal widths: each projection is worth 0.9 / 7
    np.testing.assert_allclose(block.row(2.5 * 0.9 / 7), [0.9, 0.9, 0.45, 0, 0, 0, 0], atol=1e-14)


def test_levels_at_and_just_past_the_ends():
    block = TABLE.blocks[0]
    np.testing.assert_array_equal(block.row(-1e-10), np.zeros(7))
    np.testing.assert_array_equal(block.row(float(block.levels[-1]) + 1e-10), np.full(7, 0.9))


@pytest.mark.parametrize("level", [-0.01, 0.95, float("nan")])
def test_refuses_a_level_outside_the_table(level):
    with pytest.raises(InfeasibleError, match=r"level: must be in \[0, 0\.9000\], got"):
        TABLE.sparsities([0.1, level])


def test_refuses_another_number_of_levels():
    with pytest.raises(InfeasibleError, match=r"levels: shape must be \(2,\), got \(3,\)"):
        TABLE.sparsities([0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    "levels", [[0.1, 0.5], [0.0, 0.0], [0.0, -0.1], [0.0, float("nan")]], ids=["start", "tie", "fall", "nan"]
)
def test_refuses_levels_that_do_not_rise(levels):
    with pytest.raises(InfeasibleError, match="block table: levels must rise strictly from 0"):
        BlockTable(np.array(levels), np.zeros((2, 7)))


@pytest.mark.parametrize(("levels", "rows"), [((2,), (3, 7)), ((2,), (2, 6)), ((0,), (0, 7)), ((1, 1), (1, 7))])
def test_refuses_other_shapes(levels, rows):
    with pytest.raises(InfeasibleError, match=r"block table: shapes \[rows\] and \[rows, 7\] needed, got"):
        BlockTable(np.zeros(levels), np.zeros(rows))


def test_uniform_table():
    table = uniform_table(SHAPE)
    np.testing.assert_allclose(table.sparsities([0.3, 0.99]), [[0.3] * 7, [0.99] * 7], rtol=1e-15)
    np.testing.assert_array_equal(table.max_levels, [0.99, 0.99])


def test_json_round_trip_is_exact():
    again = Table.from_json(TABLE.to_json())
    assert again.name == TABLE.name
    for ours, theirs in zip(TABLE.blocks, again.blocks, strict=True):
        np.testing.assert_array_equal(ours.levels, theirs.levels)
        np.testing.assert_array_equal(ours.sparsities, theirs.sparsities)
