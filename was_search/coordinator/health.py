"""Finds workers that are slow or fail again and again, for the pool to put in quarantine, and calls that hang."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from was_search.coordinator.calls import Work
from was_search.coordinator.contracts import LONGEST_CALL_SECONDS, WorkerPool

_CALLS = 5
"""Number of a worker's last calls of a kind, whose median is its pace."""

_ENOUGH = 3
"""Calls that a pace needs: one may have waited for something, and a worker's first compiles its kernels."""

_LEAST_LOSS_SECONDS = 1.0
"""Least time that a slow worker costs at each call; smaller delays come from any busy machine."""

_OVERDUE = 3.0
"""How many times longer than a slow pace's call, or than the slowest first call, a call in flight may take."""

_LEAST_SECONDS = 10.0
"""Time before which no call in flight is overdue."""

_PATIENCE = 20.0
"""How many times as long as the slowest of its kind a call may take, where no peer is there to compare with."""

_LEAST_PATIENCE_SECONDS = 300.0
"""Time before which no call is given up by measure: a machine may swap, a file system may hang for minutes."""

_REASON = 200
"""Characters of an error that are shown; Ray's are paragraphs."""

_LONGEST = 16
"""How many times as long as the first a later quarantine may be."""


@dataclass(frozen=True)
class QuarantinePolicy:
    """When a worker is put in quarantine, and for how long.

    Attributes:
        slowdown: ratio of its seconds a token to its peers'; 0 for never.
        failures: number of its calls lost in a row; 0 for never.
        seconds: length of the first quarantine; each further one is twice as long as the one before.
    """

    slowdown: float = 4.0
    failures: int = 3
    seconds: float = 600.0


class Health:
    """Knows every worker's pace and failures; workers go by their numbers, which outlast restarts.

    A pool has one for all that it does, so that a worker that was put in quarantine while calibrating is known when
    searching.

    Args:
        pool: puts workers in quarantine, and may refuse: never its last worker.
        policy: when and for how long.
    """

    def __init__(self, pool: WorkerPool, policy: QuarantinePolicy) -> None:
        self._pool = pool
        self._policy = policy
        self._paces: defaultdict[str, _Paces] = defaultdict(_Paces)
        self._failures: Counter[int] = Counter()
        self._times: Counter[int] = Counter()

    def answered(self, worker: int, seconds: float, work: Work) -> None:
        """Note that a call of the worker's took ``seconds``."""
        self._failures[worker] = 0
        if work.tokens <= 0:
            return
        paces = self._paces[work.kind]
        paces.add(worker, seconds, work.tokens)
        own, peers = paces.of(worker), paces.peers(worker)
        if not self._policy.slowdown or own is None or peers is None:
            return
        if own > self._policy.slowdown * peers and (own - peers) * work.tokens > _LEAST_LOSS_SECONDS:
            self._put(worker, f"slow, {own / peers:.1f} times its peers' seconds a token")

    def lost(self, worker: int, reason: str) -> bool:
        """Note that a call of the worker's was lost; returns whether it is suspected of losing whatever it is given.

        That is so from its second loss in a row until it is put in quarantine, or may not be.
        """
        self._failures[worker] += 1
        for paces in self._paces.values():
            paces.restarted(worker)
        failures = self._failures[worker]
        if failures < self._policy.failures:
            return failures > 1
        if not self._policy.failures:
            return False
        return self._put(worker, f"{failures} calls in a row were lost; the last: {reason[:_REASON]}")

    def look(self, calls: Mapping[int, Work], *, by_measure: bool = True) -> None:
        """Find calls in flight that take far too long; ``calls`` tells by ticket what they do.

        Their workers are put in quarantine where others are far faster. Without others, or where they say nothing, a
        call is given up once :meth:`patience` has run out, unless ``by_measure`` is false: then it has a limit already.
        """
        for ticket, worker, seconds in self._pool.running:
            if ticket not in calls or seconds < _LEAST_SECONDS or self._overdue(worker, seconds, calls[ticket]):
                continue
            limit = self.patience(calls[ticket])
            if by_measure and seconds > limit:
                what = _words(calls[ticket], seconds)
                self._pool.give_up(ticket, f"{what}, and {limit:.0f} s are far longer than any has taken")

    def patience(self, work: Work) -> float:
        """Seconds that a call may take without peers to compare with: 20 times the slowest recent one of its kind.

        At least five minutes; a day while no call of the kind was seen: the first one compiles, and may be the longest.
        """
        slowest = self._paces[work.kind].slowest_seconds(work.tokens)
        if slowest is None:
            return LONGEST_CALL_SECONDS
        return min(max(_PATIENCE * slowest, _LEAST_PATIENCE_SECONDS), LONGEST_CALL_SECONDS)

    def _overdue(self, worker: int, seconds: float, work: Work) -> bool:
        """Whether a call in flight was taken off its worker because peers are far faster."""
        paces = self._paces[work.kind]
        usual = paces.usual_seconds(worker, work.tokens)
        if not self._policy.slowdown or usual is None:
            return False
        limit = _OVERDUE * max(self._policy.slowdown * usual, paces.first_seconds(worker))
        if seconds <= limit:
            return False
        return self._put(worker, f"slow, {_words(work, seconds)}, {seconds / usual:.0f} times what its peers take")

    def _put(self, worker: int, reason: str) -> bool:
        seconds = self._policy.seconds * min(2 ** self._times[worker], _LONGEST)
        if not self._pool.quarantine(worker, reason, seconds):
            return False
        self._times[worker] += 1
        # The worker's pace starts anew when it comes back; no peer is compared with it until then.
        for paces in self._paces.values():
            paces.forget(worker)
        self._failures[worker] = 0
        return True


def _words(work: Work, seconds: float) -> str:
    return f"at {work.kind} for {seconds:.0f} s"


class _Paces:
    """Seconds a token that workers take for calls of one kind."""

    def __init__(self) -> None:
        self._longest = 0.0  # most tokens of a call so far, for calls in flight whose tokens are not known
        self._recent: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_CALLS))
        self._first: dict[int, float] = {}
        self._summary: _Summary | None = None  # kept: hundreds of calls in flight ask for it at once

    def add(self, worker: int, seconds: float, tokens: float) -> None:
        self._longest = max(self._longest, tokens)
        self._first.setdefault(worker, seconds)
        self._recent[worker].append(seconds / tokens)
        self._summary = None

    def restarted(self, worker: int) -> None:
        """Note that the worker's next call is the first of a new process."""
        self._first.pop(worker, None)

    def forget(self, worker: int) -> None:
        self._first.pop(worker, None)
        self._recent.pop(worker, None)
        self._summary = None

    def of(self, worker: int) -> float | None:
        """The worker's pace, None where it has had too few calls."""
        found = self._recent.get(worker, ())
        return median(found) if len(found) >= _ENOUGH else None

    def peers(self, worker: int) -> float | None:
        """The median of the other workers' paces, None where none is known."""
        others = [self.of(other) for other in self._recent if other != worker]
        paces = [pace for pace in others if pace is not None]
        return median(paces) if paces else None

    def usual_seconds(self, worker: int, tokens: float) -> float | None:
        """Seconds that a call takes the worker's peers, None where that is not known.

        One call of theirs is enough: a first call is slower than later ones, and a call that hangs holds everything up.
        """
        peers = self._now.median_without(worker)
        return None if peers is None else (tokens or self._longest) * peers

    def slowest_seconds(self, tokens: float) -> float | None:
        """Seconds of a call at the slowest recent pace of any worker, first calls included; None if there was none."""
        slowest = self._now.slowest
        return None if slowest is None else (tokens or self._longest) * slowest

    @property
    def _now(self) -> _Summary:
        if self._summary is None:
            self._summary = _Summary.of(self._recent)
        return self._summary

    def first_seconds(self, worker: int) -> float:
        """The longest that a process's first call has taken, where the worker is at its own first; else 0."""
        return 0.0 if worker in self._first else max(self._first.values(), default=0.0)


@dataclass(frozen=True)
class _Summary:
    """Summary of the recent seconds a token of all workers that have ended a call.

    Attributes:
        of_worker: each worker's median.
        rising: the same medians, sorted.
        slowest: the greatest of all calls; None where there are none.
    """

    of_worker: Mapping[int, float]
    rising: list[float]
    slowest: float | None

    @classmethod
    def of(cls, recent: Mapping[int, Iterable[float]]) -> _Summary:
        of_worker = {worker: median(paces) for worker, paces in recent.items()}
        slowest = max((pace for paces in recent.values() for pace in paces), default=None)
        return cls(of_worker, sorted(of_worker.values()), slowest)

    def median_without(self, worker: int) -> float | None:
        """The median over the other workers, None where there are none."""
        n, own = len(self.rising), len(self.rising)
        if worker in self.of_worker:
            n, own = n - 1, bisect_left(self.rising, self.of_worker[worker])
        if n == 0:
            return None
        low, high = (self.rising[i if i < own else i + 1] for i in ((n - 1) // 2, n // 2))
        return (low + high) / 2
