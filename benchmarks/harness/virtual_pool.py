"""Workers that only take time: a stand-in for the pool that measures how long they wait for the coordinator.

A call ends ``seconds`` of wall time after it was submitted, whoever looks; what a worker waits from then until its
next call is idle time. No threads, no processes, no model: the losses are a bowl around the budget.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.harness.pool_double import Given, PoolDouble
from was_search.coordinator.calls import Call
from was_search.coordinator.contracts import LONGEST_CALL_SECONDS
from was_search.coordinator.model_calls import Evaluate
from was_search.texts.protocol import Evaluation

SEQUENCES = 64
TOKENS = 2048 * SEQUENCES


@dataclass
class Window:
    """Counts between two moments: seconds that workers were idle, gaps before single calls, and calls ended."""

    start: float
    end: float = float("inf")
    idle: float = 0.0
    gaps: list[float] = field(default_factory=list)
    ended: int = 0

    def add_gap(self, begin: float, end: float) -> None:
        self.idle += max(0.0, min(end, self.end) - max(begin, self.start))
        if self.start <= end <= self.end:
            self.gaps.append(end - begin)


class VirtualPool(PoolDouble):
    """A pool without Ray, with calls that end when their time is up.

    Args:
        n_workers: number of workers.
        seconds: mean time of an evaluation; each takes 0.8 to 1.2 times as long.
        seed: decides these times and the losses' noise.
    """

    def __init__(self, n_workers: int, seconds: float, seed: int = 0) -> None:
        super().__init__(self._evaluation, n_workers, name="virtual")
        self.first_submit: float | None = None
        self.window: Window | None = None
        self._seconds = seconds
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.normal(0.0, 0.3, SEQUENCES)
        self._ends: list[tuple[float, int]] = []  # with tickets
        self._idle_since: dict[int, float] = {}  # by worker, of those that have had a call

    def submit(
        self,
        call: Call[Any],
        *,
        deadline_seconds: float = LONGEST_CALL_SECONDS,
        about: Mapping[str, Any] | None = None,
    ) -> int:
        now, index = time.monotonic(), self.next_index
        if self.first_submit is None:
            self.first_submit = now
        since = self._idle_since.pop(index, None)
        if self.window is not None and since is not None:
            self.window.add_gap(since, now)
        ticket = super().submit(call, deadline_seconds=deadline_seconds, about=about)
        heapq.heappush(self._ends, (now + self._seconds * self._rng.uniform(0.8, 1.2), ticket))
        return ticket

    def close_window(self) -> Window:
        """End the window now, count the workers that are idle, and let every call in flight end at once."""
        assert self.window is not None
        now = time.monotonic()
        self.window.end = now
        for since in self._idle_since.values():
            self.window.idle += max(0.0, now - max(since, self.window.start))
        window, self.window = self.window, None
        self._ends = [(now, ticket) for _, ticket in self._ends]
        return window

    def _due(self, timeout_seconds: float) -> Sequence[Given]:
        now = time.monotonic()
        if self._ends and timeout_seconds > 0 and self._ends[0][0] > now:
            time.sleep(min(timeout_seconds, self._ends[0][0] - now))
            now = time.monotonic()
        elif not self._ends and timeout_seconds > 0:
            time.sleep(min(timeout_seconds, 0.01))
        due = []
        while self._ends and self._ends[0][0] <= now:
            end, ticket = heapq.heappop(self._ends)
            if given := self.given.get(ticket):  # else lost or abandoned before its time
                self._idle_since[given.index] = end
                due.append(given)
        if self.window is not None:
            self.window.ended += len(due)
        return due

    def _evaluation(self, given: Given) -> Evaluation:
        """An evaluation on the bowl; a third of them stop half-way."""
        assert isinstance(given.call, Evaluate)
        losses = 2.0 + float(np.square(given.call.sparsities - 0.6).sum()) + self._noise
        stopped = given.ticket % 3 == 2
        seen = SEQUENCES // 2 if stopped else SEQUENCES
        return Evaluation(losses[:seen], TOKENS * seen // SEQUENCES, self._seconds, stopped, given.call.sparsities)
