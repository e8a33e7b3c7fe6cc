"""Spend a budget of time where it costs least: the greedy of :mod:`was_search.vectors.greedy` in another currency."""

from __future__ import annotations

import numpy as np

from was_search.decode_time.profile import LatencyProfile
from was_search.errors import InfeasibleError
from was_search.shape import FloatArray, IntArray
from was_search.vectors.roots import falling_root


def spend_time(prices: FloatArray, grid: FloatArray, profile: LatencyProfile, seconds: float) -> FloatArray:
    """Sparsities [L, 7] at which a step is predicted to take ``seconds``, at the least total price, by greedy.

    Step by step, the projection whose raise to some point of the grid costs the least price for each second that it
    saves is raised there: the steepest chord, which passes over stretches where a curve does not bend as a greedy
    would like (both the price's and the time's may). With costs linear in sparsity these chords are the edges of the
    lower convex hull, and the result is :func:`was_search.vectors.greedy.spend`'s.

    Args:
        prices: [L, 7, G], nats per token of each projection at each sparsity of ``grid``.
        grid: [G] sparsities, rising from 0.
        profile: what sparsities save.
        seconds: time of the step that is to result.

    Raises:
        InfeasibleError: prices of another shape or not finite, or ``seconds`` that the grid's end does not reach.
    """
    price = np.asarray(prices, np.float64)
    wanted = (*profile.shape.params.shape, len(grid))
    if price.shape != wanted:
        raise InfeasibleError(f"prices: shape must be {wanted}, got {price.shape}")
    if not np.all(np.isfinite(price)):
        raise InfeasibleError("prices: must be finite; the model's gradients overflow, use bfloat16 or float32")
    at = np.zeros(profile.shape.params.shape, np.int64)
    left = profile.seconds(np.zeros(at.shape)) - seconds
    launches = _Launches(profile, grid)
    ratio, end, saved = (np.zeros(at.shape), np.zeros_like(at), np.zeros(at.shape))
    for b, p in np.ndindex(at.shape):
        ratio[b, p], end[b, p], saved[b, p] = launches.steepest(price, at, b, p)
    while left > 0.0:
        b, p = (int(i) for i in np.unravel_index(int(np.argmin(ratio)), ratio.shape))
        if not np.isfinite(ratio[b, p]):
            raise InfeasibleError(f"target: {left + seconds:.6g} s are not reached at sparsities of {grid[-1]:g}")
        if saved[b, p] >= left:
            return _last_step(profile, grid, at, b, p, int(end[b, p]), seconds)
        left -= saved[b, p]
        at[b, p] = end[b, p]
        for mate in launches.mates(b, p):
            ratio[b, mate], end[b, mate], saved[b, mate] = launches.steepest(price, at, b, mate)
    return np.asarray(grid[at], np.float64)


def _last_step(
    profile: LatencyProfile, grid: FloatArray, at: IntArray, b: int, p: int, end: int, seconds: float
) -> FloatArray:
    """The last raise, made only as far as needed: the point between ``at`` and the raise that would save too much."""
    point = np.asarray(grid[at], np.float64)

    def at_level(level: float) -> float:
        point[b, p] = level
        return profile.seconds(point)

    point[b, p] = falling_root(at_level, float(grid[at[b, p]]), float(grid[end]), seconds)
    return point


class _Launches:
    """Which launch a projection is in, and what raising it there saves."""

    def __init__(self, profile: LatencyProfile, grid: FloatArray) -> None:
        self._grid = grid
        self._curves = {
            (b, p): (curve, weights)
            for curve, (_, _, weights) in zip(profile.curves, profile.members, strict=True)
            for b in curve.blocks
            for p in curve.projections
        }

    def mates(self, b: int, p: int) -> tuple[int, ...]:
        """The projections in the same launch as projection ``p`` of block ``b``."""
        return self._curves[b, p][0].projections

    def steepest(self, price: FloatArray, at: IntArray, b: int, p: int) -> tuple[float, int, float]:
        """The raise from ``at`` with the least price a second: that price, the grid's point, the seconds saved."""
        curve, weights = self._curves[b, p]
        mean = float(self._grid[at[b, list(curve.projections)]] @ weights)
        further = self._grid[at[b, p] + 1 :]
        own = float(weights[curve.projections.index(p)])
        after = np.interp(mean + own * (further - self._grid[at[b, p]]), curve.knots, curve.seconds)
        saved = float(np.interp(mean, curve.knots, curve.seconds)) - after
        cost = price[b, p, at[b, p] + 1 :] - price[b, p, at[b, p]]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(saved > 0.0, cost / saved, np.inf)
        if not len(ratio) or not np.isfinite(ratio.min()):
            return np.inf, int(at[b, p]), 0.0
        # Of equal prices the furthest point: the hull's edge, not its pieces.
        best = int(np.flatnonzero(ratio <= ratio.min() * (1 + 1e-12) + 1e-300)[-1])
        return float(ratio[best]), int(at[b, p]) + 1 + best, float(saved[best])
