"""Finds where a function that never rises takes a value."""

from __future__ import annotations

from collections.abc import Callable

TOLERANCE = 1e-9
"""A vector meets a budget of time if its prediction is within this share of it."""


def falling_root(function: Callable[[float], float], low: float, high: float, value: float) -> float:
    """x in [low, high] with ``function(x) = value`` within a thousandth of :data:`TOLERANCE`; it must not rise.

    Regula falsi in the Illinois form (Dowell and Jarratt, BIT 1971), every third step a bisection. Where the value is
    not met the nearer end is returned; where it is met on a stretch, some point of it.
    """
    enough = 1e-3 * TOLERANCE * abs(value)
    above, below = function(low) - value, function(high) - value
    if above <= enough:
        return low
    if below >= -enough:
        return high
    for step in range(200):
        middle = 0.5 * (low + high) if step % 3 == 2 else high - below * (high - low) / (below - above)
        middle = min(max(middle, low), high)
        found = function(middle) - value
        if abs(found) <= enough or high - low <= 1e-16:
            return middle
        if found > 0.0:
            low, above = middle, found
            below *= 0.5 if step % 3 == 0 else 1.0
        else:
            high, below = middle, found
            above *= 0.5 if step % 3 == 0 else 1.0
    return high
