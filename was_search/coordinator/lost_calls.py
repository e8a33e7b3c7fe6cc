"""Tells bad calls from sick workers: a bad call is lost by any worker, a sick worker loses any call."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable
from typing import TypeVar

from was_search.coordinator.contracts import Outcome, WorkerPool

_FAR_TOO_OFTEN = 3
"""A call is given up after this many times ``max_attempts`` losses, whoever lost it."""

CallT = TypeVar("CallT", bound=Hashable)


class LostCalls:
    """Counts how often calls were lost, and says when one is to be given up.

    That is when ``max_attempts`` workers have lost it; where there are fewer workers, when all of them have, together
    ``max_attempts`` times. The losses of a worker that is in quarantine since do not count, nor do those on the way
    there, as long as it loses one call after another.

    Args:
        pool: the pool of the workers.
        max_attempts: attempts at one call.
    """

    def __init__(self, pool: WorkerPool, max_attempts: int) -> None:
        self._pool = pool
        self._max_attempts = max_attempts
        self._by: defaultdict[Hashable, Counter[int]] = defaultdict(Counter)

    def lost(self, call: Hashable, outcome: Outcome, reason: str) -> bool:
        """Count a loss for the call and for its worker; returns whether the call is to be given up."""
        if outcome.blameless:
            return False
        worker, by = outcome.index, self._by[call]
        suspected = self._pool.health.lost(worker, reason)
        there = self._pool.proven
        for other in [other for other in by if other not in there]:
            del by[other]
        if worker not in there:
            return False
        if not suspected or worker in by:
            by[worker] += 1
        total = by.total()
        everyone = there <= by.keys() and total >= self._max_attempts
        return len(by) >= self._max_attempts or everyone or total >= _FAR_TOO_OFTEN * self._max_attempts

    def count(self, call: Hashable) -> int:
        """How many losses of the call count."""
        return sum(times for worker, times in self._by[call].items() if worker in self._pool.proven)

    def next_for(self, worker: int, waiting: deque[CallT]) -> CallT:
        """Take from ``waiting`` the first call that the worker has not lost yet, else the first."""
        fresh = (call for call in waiting if worker not in self._by.get(call, ()))
        call = next(fresh, waiting[0])
        waiting.remove(call)
        return call
