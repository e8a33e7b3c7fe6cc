"""The highest target whose loss of quality stays inside a limit: bracket, interpolate, and confirm what is answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

TYPICAL_SLOPE = 10.0
"""ln(nats lost) rises by about this per unit of sparsity: 8.9 to 11.3 on the demo checkpoint from 40 to 70 %."""

SLOPES = (3.0, 40.0)
"""Bounds of a slope read from two probes: noise must not send the next probe anywhere."""

OVERSHOOT = 0.4
"""How much further than the curve says a probe goes while all are on one side, as having both is worth a miss."""

_STEP = 1e-4  # probes are multiples of this, so that studies have readable names


class BracketEnd(StrEnum):
    """Why the probing ended."""

    CLOSED = "closed"  # the bracket is narrower than the tolerance
    ALL_INSIDE = "all inside"  # the highest target is inside
    ALL_OUTSIDE = "all outside"  # the lowest target is outside
    SPENT = "spent"  # no probes left
    CUT = "cut short"  # time was up


@dataclass(frozen=True)
class Probe:
    """One target that was tried: ``increase`` is perplexity over the dense model's, less 1."""

    target: float
    increase: float


@dataclass(frozen=True)
class Bracket:
    """The result of probing for a limit.

    Attributes:
        limit: limit on the increase, a fraction.
        probes: in the order in which they were made.
        ending: why there are no more.
    """

    limit: float
    probes: tuple[Probe, ...]
    ending: BracketEnd

    @property
    def inside(self) -> Probe | None:
        """The answer: the highest probe inside the limit with none outside below it; None if there is none."""
        return _bounds(self.probes, self.limit)[0]

    @property
    def outside(self) -> Probe | None:
        """The lowest probe outside the limit; None if all are inside."""
        return _bounds(self.probes, self.limit)[1]


def find_highest(
    increase: Callable[[float], float],
    limit: float,
    *,
    start: float = 0.6,
    lowest: float = 0.05,
    highest: float = 0.9,
    tolerance: float = 0.005,
    max_probes: int = 6,
) -> Bracket:
    """Probe targets until those inside and outside ``limit`` are less than ``tolerance`` apart.

    The nats lost, ln(1 + increase), grow nearly exponentially with the target, so their logarithm is interpolated.
    Every probe lies between the highest one inside and the lowest one outside, so noise in ``increase`` cannot make
    the bracket contradict itself; what is answered is always a probe that was inside.

    Args:
        increase: perplexity over dense, less 1, at a target; NaN counts as outside.
        limit: positive.
        start: the first probe, used if ``increase`` says nothing yet.
        lowest: least target; also tried last where nothing was inside before.
        highest: greatest target.
        tolerance: greatest width of the bracket, in target.
        max_probes: most calls of ``increase``.
    """
    probes: list[Probe] = []
    while True:
        ending = _ending(probes, limit, lowest, highest, tolerance, max_probes)
        if ending is not None:
            return Bracket(limit, tuple(probes), ending)
        target = _next(probes, limit, start, lowest, highest, tolerance, max_probes)
        probes.append(Probe(target, increase(target)))


def _inside(probe: Probe, limit: float) -> bool:
    return probe.increase <= limit  # not for NaN


def _bounds(probes: tuple[Probe, ...] | list[Probe], limit: float) -> tuple[Probe | None, Probe | None]:
    outside = min((p for p in probes if not _inside(p, limit)), key=lambda p: p.target, default=None)
    below = [p for p in probes if _inside(p, limit) and (outside is None or p.target < outside.target)]
    return max(below, key=lambda p: p.target, default=None), outside


def _ending(
    probes: list[Probe], limit: float, lowest: float, highest: float, tolerance: float, max_probes: int
) -> BracketEnd | None:
    inside, outside = _bounds(probes, limit)
    if inside is None and outside is not None and outside.target <= lowest:
        return BracketEnd.ALL_OUTSIDE
    if outside is None and inside is not None and inside.target >= highest:
        return BracketEnd.ALL_INSIDE
    if inside is not None and outside is not None and outside.target - inside.target < tolerance:
        return BracketEnd.CLOSED
    return BracketEnd.SPENT if len(probes) >= max_probes else None


def _next(
    probes: list[Probe],
    limit: float,
    start: float,
    lowest: float,
    highest: float,
    tolerance: float,
    max_probes: int,
) -> float:
    inside, outside = _bounds(probes, limit)
    if not probes:
        return min(max(start, lowest), highest)
    if inside is None and len(probes) == max_probes - 1:
        return lowest  # the last probe: better a poor answer than none
    low = lowest if inside is None else inside.target
    high = highest if outside is None else outside.target
    estimate = _estimate(probes, inside, outside, limit)
    near = 0.9 * tolerance
    if inside is not None and outside is not None:
        if len(probes) >= 4 and high - low > 0.5 * _width(probes[:-2], limit, lowest, highest):
            estimate = 0.5 * (low + high)  # interpolation has not halved the bracket by two probes
        # An estimate close to one end is used to put the other end next to it, which closes the bracket.
        elif estimate - low < near:
            estimate = low + near
        elif high - estimate < near:
            estimate = high - near
        estimate = min(max(estimate, low + _STEP), high - _STEP)
    elif inside is not None:
        estimate = max(estimate + OVERSHOOT * (estimate - low), low + near)
    else:
        estimate = min(estimate - OVERSHOOT * (high - estimate), high - near)
    rounded = round(round(min(max(estimate, lowest), highest) / _STEP) * _STEP, 6)
    return min(max(rounded, lowest), highest)


def _width(probes: list[Probe], limit: float, lowest: float, highest: float) -> float:
    inside, outside = _bounds(probes, limit)
    return (highest if outside is None else outside.target) - (lowest if inside is None else inside.target)


def _estimate(probes: list[Probe], inside: Probe | None, outside: Probe | None, limit: float) -> float:
    """Where the limit is met, read from ln(nats lost) at the probes that are nearest to it."""
    curved = _through_three(probes, inside, outside, limit)
    if curved is not None:
        return curved
    if inside is not None and outside is not None:
        a, b = _height(inside, limit), _height(outside, limit)
        return inside.target - a / (b - a) * (outside.target - inside.target)  # a <= 0 < b
    closest = sorted(probes, key=lambda p: p.target, reverse=outside is None)
    first, second = closest[0], closest[min(1, len(closest) - 1)]
    a, b = _height(first, limit), _height(second, limit)
    slope = TYPICAL_SLOPE
    if second.target != first.target:
        slope = min(max((b - a) / (second.target - first.target), SLOPES[0]), SLOPES[1])
    return first.target - a / slope


def _through_three(probes: list[Probe], inside: Probe | None, outside: Probe | None, limit: float) -> float | None:
    """The target as a quadratic in ln(nats lost) through three probes; None where that is no rising curve."""
    nearest = sorted(probes, key=lambda p: abs(_height(p, limit)))[:3]
    by_target = sorted(nearest, key=lambda p: p.target)
    heights = [_height(p, limit) for p in by_target]
    if len(nearest) < 3 or any(b - a < 1e-3 for a, b in pairwise(heights)):
        return None
    x, y, z = heights
    t, u, v = (p.target for p in by_target)
    found = (
        t * y * z / ((x - y) * (x - z)) + u * x * z / ((y - x) * (y - z)) + v * x * y / ((z - x) * (z - y))
    )  # Lagrange's form at height 0
    low = -math.inf if inside is None else inside.target
    high = math.inf if outside is None else outside.target
    return found if low < found < high else None


def _height(probe: Probe, limit: float) -> float:
    """ln(nats lost / nats allowed), at most 8 either way: a loss of nothing, or of everything, has no logarithm."""
    if math.isnan(probe.increase) or math.isinf(probe.increase):
        return 8.0
    lost = math.log1p(max(probe.increase, -0.99))
    return min(max(math.log(max(lost, 1e-12) / math.log1p(limit)), -8.0), 8.0)
