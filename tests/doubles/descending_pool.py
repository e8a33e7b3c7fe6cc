"""A pool without Ray that also descends, and the data it descends on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.harness.pool_double import Given, PoolDouble
from tests.doubles.loop_doubles import evaluation
from was_search.coordinator.model_calls import Descend, Evaluate
from was_search.vectors.descent import DescentOptions, descend

BEST = np.clip(0.6 + 0.1 * np.random.default_rng(0).standard_normal((3, 7)), 0.2, 0.9)
DATA = SimpleNamespace(
    tokens=np.zeros((8, 10), np.int64),
    protocol=SimpleNamespace(
        n_sequences=8,
        sequence_length=10,
        predicted_per_sequence=9,
        predicted_tokens=72,
        batch_size=4,
        dense_prefix=1,
    ),
)


class DescendingPool(PoolDouble):
    """Two workers. ``lose`` is how many descents are lost first, ``broken`` an error that they all raise."""

    def __init__(self, lose: int = 0, broken: Exception | None = None, **options: Any) -> None:
        super().__init__(self._answer, **options)
        self.lose, self.broken = lose, broken
        self.descents: list[tuple[np.ndarray, DescentOptions, int]] = []

    def _answer(self, given: Given) -> Any:
        call = given.call
        if isinstance(call, Evaluate):
            return evaluation(call.sparsities, 2.0 + float(np.square(call.sparsities - BEST).sum()))
        assert isinstance(call, Descend)
        assert given.deadline > given.started
        if self.broken is not None:
            raise self.broken
        if self.lose:
            self.lose -= 1
            raise ConnectionError("gone")
        self.descents.append((call.start, call.options, call.seed))
        noise = np.random.default_rng(call.seed).normal(0, 0.02, (3, 7))
        return descend(lambda p: p - BEST + noise, call.start, call.budget, call.options)
