"""Descent on functions whose best point is known; no model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, minimize

from was_search.errors import InfeasibleError
from was_search.shape import ModelShape
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import HIGHEST_DESCENDED, DescentOptions, descend

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 16),) * 4, ((8, 4, 4, 8, 16, 16, 8),) * 4)
BUDGET = SparsityBudget(SHAPE, 0.6)
SHARE = SHAPE.params / SHAPE.params.sum()
RNG = np.random.default_rng(0)
CENTRE = RNG.uniform(0.3, 0.9, (4, 7))
CURVATURE = RNG.uniform(0.5, 2.0, (4, 7))


def loss(point):
    return float((SHARE * CURVATURE * (point - CENTRE) ** 2).sum())


def slopes(point):
    return 2 * SHARE * CURVATURE * (point - CENTRE)


def best(target):
    """The constrained optimum by scipy, independently of our projection."""
    found = minimize(
        lambda x: loss(x.reshape(4, 7)),
        np.full(28, target),
        jac=lambda x: slopes(x.reshape(4, 7)).ravel(),
        bounds=[(0.0, HIGHEST_DESCENDED)] * 28,
        constraints=[LinearConstraint(SHARE.ravel()[None], target, target)],
        method="trust-constr",
        options={"gtol": 1e-10, "xtol": 1e-12, "maxiter": 2000},
    )
    return found.x.reshape(4, 7)


@pytest.mark.parametrize("target", [0.4, 0.6, 0.9])
def test_a_descent_nears_the_optimum(target):
    wanted = best(target)
    options = DescentOptions(rounds=200, step=0.02, last_step=0.02)
    found = descend(slopes, np.full((4, 7), target), SparsityBudget(SHAPE, target), options)
    assert SHAPE.sparsity(found) == pytest.approx(target, abs=1e-12)
    start = loss(np.full((4, 7), target))
    # Steps have a fixed length, so a descent ends about its last step (0.0004) from the optimum, not on it.
    assert loss(found) - loss(wanted) < 0.01 * (start - loss(wanted))


def test_noise_in_the_slopes_is_averaged_out():
    noise = np.random.default_rng(1)
    wanted = loss(best(0.6))

    def noisy(point):
        return slopes(point) * (1 + noise.normal(0, 1, point.shape))

    averaged = DescentOptions(rounds=60)
    last = DescentOptions(rounds=60, average=1e-9)
    off = [
        np.mean([loss(descend(noisy, np.full((4, 7), 0.6), BUDGET, options)) - wanted for _ in range(20)])
        for options in (averaged, last)
    ]
    assert off[0] < off[1]


def test_every_point_that_slopes_are_asked_for_meets_the_budget_and_the_step():
    asked = []

    def recorded(point):
        asked.append(point)
        return slopes(point)

    options = DescentOptions(rounds=5, step=0.03, clip=2.0)
    descend(recorded, RNG.uniform(0, 1, (4, 7)), SparsityBudget(SHAPE, 0.7), options)
    assert len(asked) == 5
    for point in asked:
        assert SHAPE.sparsity(point) == pytest.approx(0.7, abs=1e-12)
        assert point.min() >= 0.0
        assert point.max() <= HIGHEST_DESCENDED
    # Clipped at twice the step; projecting onto the budget shifts all by at most that much again.
    assert max(np.abs(b - a).max() for a, b in itertools.pairwise(asked)) <= 4 * 0.03


def test_equal_slopes_per_parameter_move_nothing():
    start = BUDGET.onto(CENTRE, HIGHEST_DESCENDED)
    found = descend(lambda _: SHARE, start, BUDGET, DescentOptions(rounds=3))
    np.testing.assert_allclose(found, start, atol=1e-12)


def test_the_scale_of_the_loss_does_not_matter():
    one, thousand = (
        descend(lambda p, c=c: c * slopes(p), np.full((4, 7), 0.6), BUDGET, DescentOptions(rounds=9))
        for c in (1.0, 1e3)
    )
    np.testing.assert_allclose(one, thousand, atol=1e-12)


def test_slopes_that_are_not_finite_are_refused():
    with pytest.raises(InfeasibleError, match="slopes: must be finite"):
        descend(lambda p: p * np.nan, CENTRE, BUDGET, DescentOptions())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: must be at least 1, got 0"),
        ({"step": 1.0}, r"step: must be in \(0, 1\), got 1.0"),
        ({"last_step": 0.0}, r"last_step: must be in \(0, 1\], got 0.0"),
        ({"momentum": 1.0}, r"momentum: must be in \[0, 1\), got 1.0"),
        ({"clip": 0.0}, "clip: must be positive, got 0.0"),
        ({"average": 0.0}, r"average: must be in \(0, 1\], got 0.0"),
    ],
)
def test_options_outside_their_range(change, message):
    with pytest.raises(InfeasibleError, match=message):
        DescentOptions(**change)
