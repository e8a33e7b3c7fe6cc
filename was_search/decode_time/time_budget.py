"""A budget of predicted time: a decoding step that is a given number of times as fast as the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.decode_time.greedy import spend_time
from was_search.decode_time.profile import LatencyProfile
from was_search.errors import ConfigError, InfeasibleError
from was_search.shape import FloatArray, ModelShape
from was_search.vectors.roots import TOLERANCE, falling_root
from was_search.vectors.table import Table

HIGHEST_TIMED = 0.95
"""Highest flat sparsity whose speed-up may be asked for, as prices are known up to there."""


@dataclass(frozen=True)
class TimeBudget:
    """Vectors whose step is predicted to take ``profile.dense_seconds / speedup``.

    It is met within :data:`was_search.vectors.roots.TOLERANCE`.

    Raises:
        ConfigError: a speed-up out of the profile's reach; the message names the greatest and the least.
    """

    profile: LatencyProfile
    speedup: float

    def __post_init__(self) -> None:
        at_least, at_most = speedups(self.profile)
        if at_most <= at_least * (1.0 + TOLERANCE):
            raise ConfigError(
                f"target_speedup: sparsity saves no time on {self.profile.describe()}: the step takes "
                f"{1e3 * self.profile.predict(np.zeros(self.shape.params.shape)):.3f} ms at any"
            )
        if not self.speedup <= at_most:
            raise ConfigError(
                f"target_speedup: at most {at_most:.3f} is predicted to be possible (all projections at "
                f"{100 * HIGHEST_TIMED:g} %) on {self.profile.describe()}, got {self.speedup:g}"
            )
        if not self.speedup > at_least:
            raise ConfigError(
                f"target_speedup: must be above {at_least:.3f}, which the runtime is predicted to reach with nothing "
                f"skipped on {self.profile.describe()}, got {self.speedup:g}"
            )

    @property
    def shape(self) -> ModelShape:
        return self.profile.shape

    @property
    def seconds(self) -> float:
        """Seconds that a step may take."""
        return self.profile.dense_seconds / self.speedup

    @property
    def identity(self) -> dict[str, Any]:
        return {"target speed-up": self.speedup, "profile": self.profile.hash}

    @cached_property
    def flat(self) -> float:
        return self._flat_at(self.seconds)

    def flat_of(self, sparsities: FloatArray) -> float:
        return self._flat_at(self.profile.seconds(sparsities))

    def nominal(self, sparsities: FloatArray) -> float:
        return self.shape.sparsity(sparsities)

    def onto(self, sparsities: FloatArray, highest: float) -> FloatArray:
        raw = self.shape.tie(sparsities)
        return self._shifted(raw, lambda point: point, np.broadcast_to(highest, raw.shape))

    def onto_levels(self, levels: FloatArray, table: Table, upper: npt.ArrayLike) -> FloatArray:
        raw = np.asarray(levels, np.float64)
        return self._shifted(raw, table.sparsities, np.broadcast_to(np.asarray(upper, np.float64), raw.shape))

    def tangent(self, direction: FloatArray, point: FloatArray) -> FloatArray:
        share = self.shape.params / self.shape.params.sum()
        normal = self.profile.savings(point) / share
        length = float((normal**2 * share).sum())
        if length == 0.0:
            return np.asarray(direction - float((direction * share).sum()), np.float64)
        return np.asarray(direction - float((direction * normal * share).sum()) / length * normal, np.float64)

    def spend(self, prices: FloatArray, grid: FloatArray) -> FloatArray:
        return self.onto(spend_time(prices, grid, self.profile, self.seconds), float(grid[-1]))

    def met(self, sparsities: FloatArray) -> bool:
        """Whether the step at ``sparsities`` is predicted to take what the budget says."""
        return abs(self.profile.seconds(sparsities) / self.seconds - 1.0) <= TOLERANCE

    def _flat_at(self, seconds: float) -> float:
        ones = np.ones(self.shape.params.shape)
        return falling_root(lambda level: self.profile.seconds(level * ones), 0.0, 1.0, seconds)

    def _shifted(
        self, raw: FloatArray, vector: Callable[[FloatArray], FloatArray], upper: npt.NDArray[np.float64]
    ) -> FloatArray:
        """``clip(raw + shift, 0, upper)`` with the shift at which ``vector``, a function of it, meets the budget."""
        if not np.all(np.isfinite(raw)):
            raise InfeasibleError("raw: levels must be finite")

        def at(shift: float) -> FloatArray:
            return np.clip(raw + shift, 0.0, upper)

        def seconds(shift: float) -> float:
            return self.profile.seconds(vector(at(shift)))

        if abs(seconds(0.0) / self.seconds - 1.0) <= TOLERANCE:
            return at(0.0)  # so that projecting twice changes nothing
        low, high = float(-raw.max()), float((upper - raw).max())
        slowest, fastest = seconds(low), seconds(high)
        if not fastest <= self.seconds * (1.0 + TOLERANCE) or not slowest >= self.seconds * (1.0 - TOLERANCE):
            raise InfeasibleError(
                f"target_speedup: must be reachable within the levels' bounds [{self.profile.speedup(slowest):.4f}, "
                f"{self.profile.speedup(fastest):.4f}], got {self.speedup:g}"
            )
        return at(falling_root(seconds, low, high, self.seconds))


def speedups(profile: LatencyProfile) -> tuple[float, float]:
    """The least speed-up (nothing skipped) and the greatest (all projections at :data:`HIGHEST_TIMED`)."""
    ones = np.ones(profile.shape.params.shape)
    slowest, fastest = profile.predict(np.stack([0.0 * ones, HIGHEST_TIMED * ones]))
    return profile.speedup(float(slowest)), profile.speedup(float(fastest))
