"""The budget: what every vector of a study spends exactly, by projection.

A budget of sparsity is here; one of predicted time is :class:`was_search.decode_time.time_budget.TimeBudget`. Whoever
makes vectors (seeds, descents, spaces) knows :class:`Budget` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from was_search.errors import InfeasibleError
from was_search.shape import FloatArray, ModelShape
from was_search.vectors.greedy import spend
from was_search.vectors.table import Table


class Budget(Protocol):
    """The vectors that a study may evaluate: those that cost exactly what is to be spent.

    What a vector costs never rises with any of its sparsities. Immutable and pure; sent to workers, so it pickles.
    """

    @property
    def shape(self) -> ModelShape: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this budget, as JSON: a part of a study's identity."""
        ...

    @property
    def flat(self) -> float:
        """The one sparsity that meets the budget if all projections have it."""
        ...

    def flat_of(self, sparsities: FloatArray) -> float:
        """The one sparsity of all projections that costs as much as ``sparsities`` [L, 7]."""
        ...

    def nominal(self, sparsities: FloatArray) -> float:
        """The parameter-weighted mean of ``sparsities`` [L, 7] that meet the budget; a budget of sparsity is exact."""
        ...

    def onto(self, sparsities: FloatArray, highest: float) -> FloatArray:
        """``sparsities`` [L, 7] moved by one shift, clipped to [0, highest], so that they meet the budget.

        Projections that share a mask get one sparsity first.

        Raises:
            InfeasibleError: values that are not finite, or a budget out of reach.
        """
        ...

    def onto_levels(self, levels: FloatArray, table: Table, upper: npt.ArrayLike) -> FloatArray:
        """``levels`` [L] on ``table`` moved by one shift, clipped to [0, upper], so that they meet the budget."""
        ...

    def tangent(self, direction: FloatArray, point: FloatArray) -> FloatArray:
        """``direction`` [L, 7], a slope per parameter, less its part that would leave the budget at ``point``."""
        ...

    def spend(self, prices: FloatArray, grid: FloatArray) -> FloatArray:
        """Sparsities [L, 7] that meet the budget at the least total of ``prices`` [L, 7, G], by greedy."""
        ...


@dataclass(frozen=True)
class SparsityBudget:
    """A share of the seven projections' weights to skip: ``target``, the parameter-weighted mean sparsity."""

    shape: ModelShape
    target: float

    @property
    def identity(self) -> dict[str, Any]:
        return sparsity_identity(self.target)

    @property
    def flat(self) -> float:
        return self.target

    def flat_of(self, sparsities: FloatArray) -> float:
        return self.shape.sparsity(sparsities)

    def nominal(self, sparsities: FloatArray) -> float:
        return self.target

    def onto(self, sparsities: FloatArray, highest: float) -> FloatArray:
        tied = self.shape.tie(sparsities)
        flat = project(tied.ravel(), self.shape.params.ravel(), self.target, 0.0, highest)
        return flat.reshape(self.shape.params.shape)

    def onto_levels(self, levels: FloatArray, table: Table, upper: npt.ArrayLike) -> FloatArray:
        return project(levels, self.shape.block_params, self.target, 0.0, upper)

    def tangent(self, direction: FloatArray, point: FloatArray) -> FloatArray:
        share = self.shape.params / self.shape.params.sum()
        return np.asarray(direction - float((direction * share).sum()), np.float64)

    def spend(self, prices: FloatArray, grid: FloatArray) -> FloatArray:
        return spend(prices, grid, self.shape.params, self.target, groups=self.shape.groups)


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


def sparsity_identity(target: float) -> dict[str, Any]:
    """The ``identity`` of a :class:`SparsityBudget`, which needs no model's shape."""
    return {"target": target}
