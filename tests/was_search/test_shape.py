from __future__ import annotations

import numpy as np
import pytest

from was_search.errors import ModelError
from was_search.shape import PROJECTIONS, ModelShape

# Two blocks of different widths, grouped-query: k and v are a quarter of q.
IN = ((8, 8, 8, 8, 8, 8, 20), (12, 12, 12, 12, 12, 12, 30))
OUT = ((8, 2, 2, 8, 20, 20, 8), (12, 3, 3, 12, 30, 30, 12))


def test_params_are_products_of_the_widths():
    shape = ModelShape(IN, OUT)
    for b in range(2):
        for p in range(len(PROJECTIONS)):
            assert shape.params[b, p] == IN[b][p] * OUT[b][p]
        assert shape.block_params[b] == sum(i * o for i, o in zip(IN[b], OUT[b], strict=True))
    assert shape.n_blocks == 2


def test_params_do_not_overflow_32_bits():
    wide = ((100_000,) * 7,)
    assert ModelShape(wide, wide).block_params[0] == 7 * 10**10


def test_sparsity_counts_parameters_one_by_one():
    shape = ModelShape(IN, OUT)
    sparsities = np.random.default_rng(0).uniform(0, 1, (2, 7))
    dropped = total = 0.0
    for b in range(2):
        for p in range(7):
            total += IN[b][p] * OUT[b][p]
            dropped += IN[b][p] * OUT[b][p] * sparsities[b, p]
    assert shape.sparsity(sparsities) == pytest.approx(dropped / total, rel=1e-14)  # order of the sum only
    levels = shape.levels(sparsities)
    assert (levels * shape.block_params).sum() / shape.block_params.sum() == pytest.approx(dropped / total, rel=1e-14)


def test_equal_sparsities_give_that_level():
    shape = ModelShape(IN, OUT)
    np.testing.assert_allclose(shape.levels(np.full((2, 7), 0.3)), 0.3, rtol=1e-15)


def test_json_round_trip():
    shape = ModelShape(IN, OUT)
    assert ModelShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize("rows", [(), ((8,) * 6,), ((8,) * 6 + (0,),)])
def test_refuses_rows_without_seven_positive_widths(rows):
    with pytest.raises(ModelError, match=r"in_features: every block needs 7 positive widths, got"):
        ModelShape(rows, OUT)
    with pytest.raises(ModelError, match=r"out_features: every block needs 7 positive widths, got"):
        ModelShape(IN, rows)


def test_refuses_different_numbers_of_blocks():
    with pytest.raises(ModelError, match="different numbers of blocks"):
        ModelShape(IN, OUT[:1])
