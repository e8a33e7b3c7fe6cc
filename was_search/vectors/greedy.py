"""Spend a budget where it costs least: pure algorithms on arrays of prices, and on a block's error function.

``spend`` is the Fisher-priced greedy over all projections; ``path`` is the same greedy kept as a table;
``block_path`` is the component-level greedy by block-output error (TEAL section 4.3, used by WAS), the baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from was_search.errors import InfeasibleError
from was_search.shape import N_PROJECTIONS, SEPARATE, FloatArray, Groups, IntArray
from was_search.vectors.table import BlockTable


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


@dataclass(frozen=True)
class _Segment:
    """A piece of one curve's hull: ``slope`` is the price of dropping one more parameter."""

    slope: float
    curve: int
    start: float
    end: float


def _segments(prices: FloatArray, grid: FloatArray, params: IntArray) -> list[_Segment]:
    """Hull segments of all curves, cheapest first; the order within a curve is kept."""
    found: list[_Segment] = []
    for curve, price in enumerate(prices):
        hull = convex_hull(grid, price)
        # Rounding may put a segment's price below that of the one before it; the order within a curve must hold.
        slopes = np.maximum.accumulate(np.diff(price[hull]) / np.diff(grid[hull])) / params[curve]
        for a, b, slope in zip(hull[:-1], hull[1:], slopes, strict=True):
            found.append(_Segment(float(slope), curve, float(grid[a]), float(grid[b])))
    found.sort(key=lambda segment: (segment.slope, segment.start, segment.curve))
    return found


def spend(
    prices: npt.ArrayLike,
    grid: npt.ArrayLike,
    params: npt.ArrayLike,
    target: float,
    *,
    groups: Groups = SEPARATE,
) -> FloatArray:
    """Sparsities that meet ``target`` exactly at the least total price, over all projections at once.

    Args:
        prices: [L, 7, G], the price in nats per token of each projection at each sparsity of ``grid``.
        grid: [G] sparsities, rising from 0.
        params: [L, 7] weights.
        target: parameter-weighted mean of the result.
        groups: projections that share a mask: they get one sparsity, at the sum of their prices.

    Returns:
        float64 [L, 7].

    Raises:
        InfeasibleError: non-finite prices, or a target beyond the grid's end.
    """
    price, levels, count = _checked(prices, grid, params)
    if not -1e-9 <= target <= levels[-1] + 1e-9:
        raise InfeasibleError(f"target: must be in [0.0000, {levels[-1]:.4f}], got {target}")
    price, count = _merged(groups, price, count)
    flat = count.ravel().astype(np.float64)
    result = np.zeros(len(flat))
    left = target * float(flat.sum())
    for segment in _segments(price.reshape(-1, len(levels)), levels, count.ravel()):
        cost = flat[segment.curve] * (segment.end - segment.start)
        if cost >= left:
            result[segment.curve] = segment.start + max(left, 0.0) / flat[segment.curve]
            break
        result[segment.curve] = segment.end
        left -= cost
    return _expanded(groups, result.reshape(count.shape))


def path(
    prices: npt.ArrayLike,
    grid: npt.ArrayLike,
    params: npt.ArrayLike,
    *,
    groups: Groups = SEPARATE,
) -> BlockTable:
    """One block's table: the greedy of :func:`spend` on its seven projections, with a row wherever it turns.

    ``prices`` [7, G], ``grid`` [G] and ``params`` [7]; the table goes from nothing dropped to the grid's end.
    """
    price, levels, count = _checked(prices, grid, params)
    price, merged = _merged(groups, price, count)
    current = np.zeros(len(groups))
    rows = [current.copy()]
    for segment in _segments(price, levels, merged):
        current[segment.curve] = segment.end
        rows.append(current.copy())
    return _block_table(list(_expanded(groups, np.array(rows))), count)


def _merged(groups: Groups, prices: FloatArray, count: IntArray) -> tuple[FloatArray, IntArray]:
    """Curves of groups from those of projections: prices [..., 7, G], parameters [..., 7]."""
    parts = [list(group) for group in groups]
    return (
        np.stack([prices[..., part, :].sum(axis=-2) for part in parts], axis=-2),
        np.stack([count[..., part].sum(axis=-1) for part in parts], axis=-1),
    )


def _expanded(groups: Groups, values: FloatArray) -> FloatArray:
    """Values of projections [..., 7] from those of their groups."""
    owner = np.empty(N_PROJECTIONS, np.intp)
    for g, group in enumerate(groups):
        owner[list(group)] = g
    result: FloatArray = values[..., owner]
    return result


def block_path(
    error: Callable[[FloatArray], float],
    params: npt.ArrayLike,
    *,
    step: float = 0.05,
    highest: float = 0.95,
    groups: Groups = SEPARATE,
) -> BlockTable:
    """The component-level greedy: raise, step by step, the projection whose raise hurts the block's output least.

    Every step drops the same number of parameters, ``step`` of the block's, whichever projection takes it.

    Args:
        error: block-output error at sparsities [7].
        params: weights [7].
        step: share of the block's parameters dropped by one step.
        highest: no projection goes above this sparsity; where a full step would, it takes what is left.
        groups: projections that share a mask: they are raised together.

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
        for group in groups:
            p, own = group[0], float(count[list(group)].sum())
            if current[p] < highest - 1e-12:
                raised = current.copy()
                raised[list(group)] = min(highest, current[p] + quantum / own)
                cost = error(raised)
                if not np.isfinite(cost):
                    raise InfeasibleError(f"block error: must be finite, got {cost} at sparsities {raised.tolist()}")
                # A clipped step drops fewer parameters: compare the error that each parameter adds.
                trials.append(((cost - reached) / (own * (raised[p] - current[p])), cost, raised))
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
