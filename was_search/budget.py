"""The budget: every vector meets the target exactly, by projection."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from was_search.errors import InfeasibleError
from was_search.shape import FloatArray


def project(
    raw: npt.ArrayLike,
    weights: npt.ArrayLike,
    target: float,
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
) -> FloatArray:
    """The point of the budget nearest to ``raw`` in the weighted square norm: ``clip(raw + shift, lower, upper)``.

    The weighted mean of the clipped point rises with the shift and is linear between the shifts at which a
    coordinate meets a bound, so the shift is found exactly among these breakpoints.

    Args:
        raw: the wanted levels, [n].
        weights: parameter counts, [n], positive.
        target: the weighted mean that the result has, to float64 rounding.
        lower: least values, [n] or a scalar.
        upper: greatest values, [n] or a scalar.

    Returns:
        float64 [n].

    Raises:
        InfeasibleError: non-finite raw values, or a target that the bounds cannot reach.
    """
    wanted = np.asarray(raw, np.float64)
    share = np.asarray(weights, np.float64)
    share = share / share.sum()
    low = np.broadcast_to(np.asarray(lower, np.float64), wanted.shape)
    high = np.broadcast_to(np.asarray(upper, np.float64), wanted.shape)
    if not np.all(np.isfinite(wanted)):
        raise InfeasibleError("raw: levels must be finite")
    least, most = float(share @ low), float(share @ high)
    if not least - 1e-12 <= target <= most + 1e-12:
        raise InfeasibleError(
            f"target: must be reachable within the levels' bounds [{least:.4f}, {most:.4f}], got {target}"
        )
    shifts = np.unique(np.concatenate([low - wanted, high - wanted]))
    means = np.array([share @ np.clip(wanted + shift, low, high) for shift in shifts])
    right = int(np.clip(np.searchsorted(means, target), 1, max(len(shifts) - 1, 1)))
    if len(shifts) == 1 or means[right] == means[right - 1]:
        shift = float(shifts[min(right, len(shifts) - 1)])
    else:
        inside = (target - means[right - 1]) / (means[right] - means[right - 1])
        shift = float(shifts[right - 1] + inside * (shifts[right] - shifts[right - 1]))
    levels: FloatArray = np.clip(wanted + shift, low, high)
    return levels
