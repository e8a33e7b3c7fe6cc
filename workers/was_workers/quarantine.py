"""Finds workers that are slow or fail again and again, and has the pool put them in quarantine."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Container
from dataclasses import dataclass
from statistics import median
from typing import Protocol

_EVALUATIONS = 5
"""A worker's last ones, whose median is its pace."""

_ENOUGH = 3
"""Evaluations that a pace needs: one may have waited for something, and a worker's first compiles its kernels."""

_OVERDUE = 3.0
"""A call in flight may take so much longer again than what makes a pace slow."""

_LEAST_SECONDS = 10.0
"""No call in flight is overdue before."""

_REASON = 200
"""Characters of an error that are shown; Ray's are paragraphs."""

_LONGEST = 16
"""A quarantine is at most so many times as long as the first."""


@dataclass(frozen=True)
class QuarantinePolicy:
    """When a worker is put in quarantine, and for how long.

    Attributes:
        slowdown: its pace is so many times its peers' seconds a token; 0 for never.
        failures: so many of its calls in a row were lost; 0 for never.
        seconds: the first time; each further one is twice as long as the one before.
    """

    slowdown: float = 4.0
    failures: int = 3
    seconds: float = 600.0


class Wards(Protocol):
    """What is needed of the pool."""

    @property
    def running(self) -> list[tuple[int, int, float]]: ...

    def quarantine(self, index: int, reason: str, seconds: float) -> bool: ...


class Health:
    """Knows every worker's pace and failures; workers go by their numbers, which outlast restarts.

    Args:
        pool: which may refuse: its last worker is never put in quarantine.
        policy: see there.
    """

    def __init__(self, pool: Wards, policy: QuarantinePolicy) -> None:
        self._pool = pool
        self._policy = policy
        self._tokens = 0  # of the longest evaluation, which a call in flight is taken for
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_EVALUATIONS))
        self._failures: Counter[int] = Counter()
        self._times: Counter[int] = Counter()

    def evaluated(self, worker: int, seconds: float, tokens: int) -> None:
        """An evaluation of ``tokens`` took ``seconds``."""
        self._failures[worker] = 0
        if tokens <= 0:
            return
        self._tokens = max(self._tokens, tokens)
        self._seconds[worker].append(seconds / tokens)
        own, peers = self._pace(worker), self._peers(worker)
        if self._policy.slowdown and own is not None and peers is not None and own > self._policy.slowdown * peers:
            self._put(worker, f"slow, {own / peers:.1f} times its peers' seconds a token")

    def lost(self, worker: int, reason: str) -> None:
        """A call of the worker's was lost."""
        self._failures[worker] += 1
        if 0 < self._policy.failures <= self._failures[worker]:
            self._put(worker, f"{self._failures[worker]} calls in a row were lost; the last: {reason[:_REASON]}")

    def look(self, evaluations: Container[int]) -> None:
        """Find calls in flight that take far too long; ``evaluations`` are the tickets of those that evaluate."""
        if not self._policy.slowdown:
            return
        for ticket, worker, seconds in self._pool.running:
            if (
                ticket not in evaluations
                or seconds < _LEAST_SECONDS
                or (peers := self._peers(worker, enough=1)) is None
            ):
                continue
            times = seconds / (self._tokens * peers)
            if times > _OVERDUE * self._policy.slowdown:
                self._put(worker, f"slow, at an evaluation for {seconds:.0f} s, {times:.0f} times what its peers take")

    def _pace(self, worker: int, enough: int = _ENOUGH) -> float | None:
        found = self._seconds.get(worker, ())
        return median(found) if len(found) >= enough else None

    def _peers(self, worker: int, enough: int = _ENOUGH) -> float | None:
        """The median of the other workers' paces, None where none is known.

        For a call in flight one evaluation is ``enough``: it was slower than those that follow, and a seed that hangs
        holds everything up.
        """
        others = [self._pace(other, enough) for other in self._seconds if other != worker]
        paces = [pace for pace in others if pace is not None]
        return median(paces) if paces else None

    def _put(self, worker: int, reason: str) -> None:
        seconds = self._policy.seconds * min(2 ** self._times[worker], _LONGEST)
        if self._pool.quarantine(worker, reason, seconds):
            self._times[worker] += 1
            # It starts anew when it comes back, and no peer is compared with it until then.
            self._seconds.pop(worker, None)
            self._failures[worker] = 0
