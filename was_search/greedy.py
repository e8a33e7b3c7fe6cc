"""Spend a budget where it costs least: pure algorithms on arrays of prices, and on a block's error function.

``spend`` is the Fisher-priced greedy over all projections; ``path`` is the same greedy kept as a table;
``block_path`` is the component-level greedy by block-output error (TEAL section 4.3, used by WAS), the baseline.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from was_search.errors import InfeasibleError
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray
from was_search.table import BlockTable


def convex_hull(grid: FloatArray, prices: FloatArray) -> IntArray:
    """Indices of the lower convex hull of the points (grid, prices), first and last included.

    A greedy over the hull's segments is optimal for the sum of the hulls: no segment is cheaper than the one
    before it in the same curve.
    """
    hull: list[int] = []
    for i in range(len(grid)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (prices[b] - prices[a]) * (grid[i] - grid[b]) >= (prices[i] - prices[b]) * (grid[b] - grid[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return np.asarray(hull, np.int64)


def _segments(prices: FloatArray, grid: FloatArray, params: IntArray) -> list[tuple[float, int, float, float]]:
    """All hull segments as (price per parameter, curve, from, to), cheapest first; order within a curve is kept."""
    found: list[tuple[float, int, float, float]] = []
    for curve in range(len(prices)):
        hull = convex_hull(grid, prices[curve])
        # Rounding may put a segment's price below that of the one before it; the order within a curve must hold.
        slopes = np.maximum.accumulate(np.diff(prices[curve][hull]) / np.diff(grid[hull])) / params[curve]
        for a, b, slope in zip(hull[:-1], hull[1:], slopes, strict=True):
            found.append((float(slope), curve, float(grid[a]), float(grid[b])))
    found.sort(key=lambda segment: (segment[0], segment[2], segment[1]))
    return found


def spend(prices: npt.ArrayLike, grid: npt.ArrayLike, params: npt.ArrayLike, target: float) -> FloatArray:
    """Sparsities that meet ``target`` exactly at the least total price, over all projections at once.

    Args:
        prices: [L, 7, G], the price in nats per token of each projection at each sparsity of ``grid``.
        grid: [G] sparsities, rising from 0.
        params: [L, 7] weights.
        target: parameter-weighted mean of the result.

    Returns:
        float64 [L, 7].

    Raises:
        InfeasibleError: non-finite prices, or a target above what the grid reaches.
    """
    price, levels, count = _checked(prices, grid, params)
    shape = count.shape
    if not 0.0 <= target <= levels[-1]:
        raise InfeasibleError(f"target: must be in [0, {levels[-1]}], got {target}")
    left = target * float(count.sum())
    result = np.zeros(count.size)
    for _, curve, start, end in _segments(price.reshape(-1, len(levels)), levels, count.ravel()):
        cost = float(count.ravel()[curve]) * (end - start)
        if cost >= left:
            result[curve] = start + left / float(count.ravel()[curve])
            break
        result[curve] = end
        left -= cost
    return result.reshape(shape)


def path(prices: npt.ArrayLike, grid: npt.ArrayLike, params: npt.ArrayLike) -> BlockTable:
    """One block's table: the greedy of :func:`spend` on its seven projections, a row where it turns.

    ``prices`` [7, G], ``grid`` [G], ``params`` [7].
    """
    price, levels, count = _checked(prices, grid, params)
    current = np.zeros(N_PROJECTIONS)
    rows = [current.copy()]
    for _, curve, _, end in _segments(price, levels, count):
        current[curve] = end
        rows.append(current.copy())
    return _block_table(rows, count)


def block_path(
    error: Callable[[FloatArray], float],
    params: npt.ArrayLike,
    *,
    step: float = 0.05,
    highest: float = 0.95,
) -> BlockTable:
    """The component-level greedy: raise, step by step, the projection whose raise hurts the block's output least.

    Every step drops the same number of parameters, ``step`` of the block's, whichever projection takes it.

    Args:
        error: block-output error at sparsities [7].
        params: weights [7].
        step: share of the block's parameters dropped by one step.
        highest: no projection goes above this sparsity; where a full step would, it takes what is left.

    Raises:
        InfeasibleError: an error that is not finite.
    """
    count = np.asarray(params, np.int64)
    quantum = step * float(count.sum())
    current = np.zeros(N_PROJECTIONS)
    rows = [current.copy()]
    reached = 0.0
    while np.any(current < highest - 1e-12):
        trials = []
        for p in range(N_PROJECTIONS):
            if current[p] < highest - 1e-12:
                raised = current.copy()
                raised[p] = min(highest, current[p] + quantum / float(count[p]))
                cost = error(raised)
                if not np.isfinite(cost):
                    raise InfeasibleError(f"block error: must be finite, got {cost} at sparsities {raised.tolist()}")
                # A clipped step drops fewer parameters: compare the error that each parameter adds.
                trials.append(((cost - reached) / (float(count[p]) * (raised[p] - current[p])), cost, raised))
        _, reached, current = min(trials, key=lambda trial: trial[0])
        rows.append(current.copy())
    return _block_table(rows, count)


def _block_table(rows: list[FloatArray], count: IntArray) -> BlockTable:
    table = np.stack(rows)
    levels = (table * count).sum(axis=1) / float(count.sum())
    keep = np.concatenate([[True], np.diff(levels) > 1e-12])
    return BlockTable(levels[keep], table[keep])


def _checked(
    prices: npt.ArrayLike, grid: npt.ArrayLike, params: npt.ArrayLike
) -> tuple[FloatArray, FloatArray, IntArray]:
    price = np.asarray(prices, np.float64)
    levels = np.asarray(grid, np.float64)
    count = np.asarray(params, np.int64)
    if price.shape != (*count.shape, len(levels)):
        raise InfeasibleError(f"prices: shape must be {(*count.shape, len(levels))}, got {price.shape}")
    if levels[0] != 0.0 or not np.all(np.diff(levels) > 0.0):
        raise InfeasibleError("grid: must rise strictly from 0")
    if not np.all(np.isfinite(price)):
        raise InfeasibleError("prices: must be finite; the model's gradients overflow, use bfloat16 or float32")
    return price, levels, count
