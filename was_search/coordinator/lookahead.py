"""How many vectors to choose before a worker asks for them."""

from __future__ import annotations

import math

MIN_WORKERS = 8
"""Smallest pool that chooses ahead: in a smaller one the next result that is due comes later than the choice."""

MOST = 16
WORTH = 0.001
"""Share of a worker's time that choosing its next vector must take before choosing ahead is worth it."""

_SMOOTHING = 0.1


class Lookahead:
    """Measures evaluations and choices, and says how many vectors to choose ahead."""

    def __init__(self) -> None:
        self._evaluation: float | None = None
        self._choice: float | None = None

    @property
    def evaluation_seconds(self) -> float | None:
        """What an evaluation usually takes; None before the first."""
        return self._evaluation

    def evaluated(self, seconds: float) -> None:
        self._evaluation = _smooth(self._evaluation, seconds)

    def chose(self, seconds: float) -> None:
        self._choice = _smooth(self._choice, seconds)

    def depth(self, n_workers: int) -> int:
        """Vectors to have in store for ``n_workers``; 0 where waiting for the choice costs next to nothing."""
        if n_workers < MIN_WORKERS or self._evaluation is None or self._choice is None:
            return 0
        share = self._choice / max(self._evaluation, 1e-6)
        return min(math.ceil(4 * n_workers * share), n_workers // 4, MOST) if share > WORTH else 0


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
