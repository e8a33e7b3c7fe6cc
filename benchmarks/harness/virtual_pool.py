"""Workers that only take time: a stand-in for the pool that measures how long they wait for the coordinator.

A call ends ``seconds`` of wall time after it was submitted, whoever looks; what a worker waits from then until its
next call is idle time. No threads, no processes, no model: the losses are a bowl around the budget.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from was_search.coordinator.calls import Call, Held
from was_search.coordinator.contracts import Outcome
from was_search.coordinator.health import Health, QuarantinePolicy
from was_search.coordinator.model_calls import Evaluate
from was_search.studies.pool_state import PoolState
from was_search.texts.protocol import Evaluation

T = TypeVar("T")

SEQUENCES = 64
TOKENS = 2048 * SEQUENCES


@dataclass
class Window:
    """What happened between two moments: seconds that workers were idle, the gaps before single calls, calls ended."""

    start: float
    end: float = float("inf")
    idle: float = 0.0
    gaps: list[float] = field(default_factory=list)
    ended: int = 0

    def add_gap(self, begin: float, end: float) -> None:
        self.idle += max(0.0, min(end, self.end) - max(begin, self.start))
        if self.start <= end <= self.end:
            self.gaps.append(end - begin)


class VirtualPool:
    """What :class:`was_search.coordinator.loop.SearchLoop` needs of a pool.

    Args:
        n_workers: how many.
        seconds: of an evaluation; each takes 0.8 to 1.2 times as long.
        seed: of these and of the losses' noise.
    """

    def __init__(self, n_workers: int, seconds: float, seed: int = 0) -> None:
        self.n_workers = n_workers
        self.n_submitted = 0
        self.first_submit: float | None = None
        self.window: Window | None = None
        self._seconds = seconds
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.normal(0.0, 0.3, SEQUENCES)
        self._idle = deque((name, float("nan")) for name in (f"virtual-{i}" for i in range(n_workers)))
        self._running: list[tuple[float, int, str, Any, float]] = []  # end, ticket, worker, sparsities, start
        self._ended: deque[tuple[str, float]] = deque()

    @cached_property
    def health(self) -> Health:
        return Health(self, QuarantinePolicy())

    @property
    def proven(self) -> frozenset[int]:
        return frozenset({-1})

    @property
    def state(self) -> PoolState:
        return PoolState(str(self.n_workers), ready=self.n_workers)

    @property
    def running(self) -> list[tuple[int, int, float]]:
        now = time.monotonic()
        return [(ticket, _number(name), now - start) for _, ticket, name, _, start in self._running]

    def need(self, n: int) -> None:
        pass

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        return False

    def give_up(self, ticket: int, reason: str) -> None:
        pass

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    @property
    def next_idle(self) -> str:
        return self._idle[0][0]

    @property
    def idle_names(self) -> list[str]:
        return [name for name, _ in self._idle]

    def share(self, value: T) -> Held[T]:
        return Held(value)

    def submit(
        self, call: Call[Any], *, deadline_seconds: float = 3600.0, about: Mapping[str, Any] | None = None
    ) -> int:
        assert isinstance(call, Evaluate)
        now = time.monotonic()
        name, since = self._idle.popleft()
        if self.first_submit is None:
            self.first_submit = now
        if self.window is not None and since == since:
            self.window.add_gap(since, now)
        ticket = self.n_submitted
        self.n_submitted += 1
        takes = self._seconds * self._rng.uniform(0.8, 1.2)
        heapq.heappush(self._running, (now + takes, ticket, name, call.sparsities, now))
        return ticket

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        now = time.monotonic()
        if self._running and timeout_seconds > 0 and self._running[0][0] > now:
            time.sleep(min(timeout_seconds, self._running[0][0] - now))
            now = time.monotonic()
        elif not self._running and timeout_seconds > 0:
            time.sleep(min(timeout_seconds, 0.01))
        outcomes = []
        while self._running and self._running[0][0] <= now:
            end, ticket, name, sparsities, _ = heapq.heappop(self._running)
            self._idle.append((name, end))
            if self.window is not None:
                self.window.ended += 1
            outcomes.append(Outcome(ticket, name, value=self._evaluation(ticket, sparsities), index=_number(name)))
        return outcomes

    def close_window(self) -> Window:
        """End the window now, count the workers that are idle, and let every call in flight end at once."""
        assert self.window is not None
        now = time.monotonic()
        self.window.end = now
        for _, since in self._idle:
            if since == since:
                self.window.idle += max(0.0, now - max(since, self.window.start))
        window, self.window = self.window, None
        self._running = [(now, *others) for _, *others in self._running]
        return window

    def _evaluation(self, ticket: int, sparsities: Any) -> Evaluation:
        """A third of the evaluations stop half-way."""
        losses = 2.0 + float(np.square(sparsities - 0.6).sum()) + self._noise
        stopped = ticket % 3 == 2
        seen = SEQUENCES // 2 if stopped else SEQUENCES
        return Evaluation(losses[:seen], TOKENS * seen // SEQUENCES, self._seconds, stopped, sparsities)


def _number(name: str) -> int:
    return int(name.removeprefix("virtual-"))
