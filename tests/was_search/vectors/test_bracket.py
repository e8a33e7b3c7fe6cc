from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq

from was_search.vectors.bracket import Bracket, BracketEnd, Probe, find_highest

TOLERANCE = 0.005
DEMO = ([0.0, 0.4, 0.5, 0.6, 0.7, 0.95], [0.0, 0.035, 0.087, 0.240, 0.731, 4.0])
"""Nats lost by uniform sparsity on the demo checkpoint; the ends are made up."""


def exponential(slope: float, at_60: float) -> Callable[[float], float]:
    return lambda t: math.expm1(at_60 * math.exp(slope * (t - 0.6)))


def power(exponent: float, scale: float) -> Callable[[float], float]:
    return lambda t: math.expm1(scale * t**exponent)


def tabled(t: float) -> float:
    """Straight lines between the measured points: convex with kinks, which no model of the curve expects."""
    return math.expm1(float(np.interp(t, *DEMO)))


CURVES = [
    *(exponential(slope, at_60) for slope in (6.0, 10.0, 18.0) for at_60 in (0.02, 0.24, 1.0)),
    *(power(exponent, scale) for exponent in (2.0, 4.0, 8.0) for scale in (0.5, 3.0)),
    tabled,
]


def check(found: Bracket, curve: Callable[[float], float], limit: float) -> None:
    """What holds whatever the curve: the answer was measured inside, and the end is what the probes say."""
    assert 1 <= len(found.probes) <= 6
    targets = [probe.target for probe in found.probes]
    assert len(set(targets)) == len(targets)
    assert all(0.05 <= target <= 0.9 for target in targets)
    if found.inside is not None:
        assert found.inside in found.probes
        assert found.inside.increase <= limit
    if found.outside is not None:
        assert not found.outside.increase <= limit
    if found.inside is not None and found.outside is not None:
        assert found.inside.target < found.outside.target
        assert (found.ending is BracketEnd.CLOSED) == (found.outside.target - found.inside.target < TOLERANCE)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("number", range(len(CURVES)))
def test_smooth_curves_are_bracketed_within_six_probes(number: int, limit: float) -> None:
    curve = CURVES[number]
    found = find_highest(curve, limit)
    check(found, curve, limit)
    if curve(0.9) <= limit:
        assert found.ending is BracketEnd.ALL_INSIDE
        assert found.inside == Probe(0.9, curve(0.9))
    elif curve(0.05) > limit:
        assert found.ending is BracketEnd.ALL_OUTSIDE
        assert found.inside is None
    else:
        root = brentq(lambda t: curve(t) - limit, 0.05, 0.9)
        assert found.ending is BracketEnd.CLOSED
        assert root - TOLERANCE < found.inside.target <= root < found.outside.target


@pytest.mark.parametrize("start", [0.05, 0.3, 0.9])
def test_any_start_will_do(start: float) -> None:
    found = find_highest(tabled, 0.1, start=start)
    check(found, tabled, 0.1)
    assert found.probes[0].target == start
    assert found.ending is BracketEnd.CLOSED


@pytest.mark.parametrize("seed", range(30))
def test_noise_cannot_make_the_bracket_contradict_itself(seed: int) -> None:
    """Noise as large as the loss itself: whatever comes out was measured, once, and lies below what was outside."""
    rng = np.random.default_rng(seed)
    smooth = exponential(10.0, 0.24)
    asked: dict[float, float] = {}

    def curve(t: float) -> float:
        asked[t] = smooth(t) * float(rng.lognormal(0.0, 0.7)) - 0.01
        return asked[t]

    found = find_highest(curve, 0.1)
    check(found, curve, 0.1)
    assert {probe.target: probe.increase for probe in found.probes} == asked


def test_small_noise_moves_the_answer_a_little() -> None:
    smooth = exponential(10.0, 0.24)
    root = brentq(lambda t: smooth(t) - 0.1, 0.05, 0.9)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = find_highest(lambda t, rng=rng: smooth(t) * float(rng.lognormal(0.0, 0.05)), 0.1)
        check(found, smooth, 0.1)
        # 5 % noise at a slope of 10 is 0.005 of target a standard deviation; six probes, four deviations
        assert abs(found.inside.target - root) < 0.02 + TOLERANCE


def test_a_model_that_gains_from_sparsity_and_then_breaks() -> None:
    def curve(t: float) -> float:
        return -0.01 if t < 0.7 else 5.0

    found = find_highest(curve, 0.05)
    check(found, curve, 0.05)
    assert found.inside is not None
    assert found.outside is not None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_outside(broken: float) -> None:
    found = find_highest(lambda t: broken if t > 0.3 else 0.2 * t, 0.1)
    check(found, lambda t: t, 0.1)
    assert found.inside is not None
    assert found.inside.target <= 0.3 < found.outside.target


def test_even_the_lowest_is_outside() -> None:
    found = find_highest(lambda t: 1.0 + t, 0.05)
    assert found.ending is BracketEnd.ALL_OUTSIDE
    assert found.probes[-1].target == 0.05
    assert found.inside is None


def test_the_last_probe_is_the_lowest_where_nothing_was_inside() -> None:
    """A cliff far below what interpolation expects."""
    found = find_highest(lambda t: 0.0501 if t > 0.06 else 0.0, 0.05)
    check(found, lambda t: t, 0.05)
    assert found.inside is not None
    assert found.inside.target == 0.05


def test_probes_have_readable_targets() -> None:
    for probe in find_highest(exponential(9.3, 0.211), 0.0777).probes:
        assert probe.target == round(probe.target, 4)
