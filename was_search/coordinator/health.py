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
"""A worker's last ones of a kind, whose median is its pace."""

_ENOUGH = 3
"""Calls that a pace needs: one may have waited for something, and a worker's first compiles its kernels."""

_LEAST_LOSS_SECONDS = 1.0
"""What a slow worker costs at each call, at the least: far below, a busy machine makes any call slow."""

_OVERDUE = 3.0
"""A call in flight may take so much longer again than what makes a pace slow, or than the slowest first call."""

_LEAST_SECONDS = 10.0
"""No call in flight is overdue before."""

_PATIENCE = 20.0
"""A call may take so many times as long as the slowest of its kind; above what an overdue one may have beside peers."""

_LEAST_PATIENCE_SECONDS = 300.0
"""Before, nothing is given up by measure: a machine may swap, a file system may stand still for minutes."""

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


class Health:
    """Knows every worker's pace and failures; workers go by their numbers, which outlast restarts.

    One for all that a pool does, so that whoever was put in quarantine while calibrating is known when searching.

    Args:
        pool: which may refuse: its last worker is never put in quarantine.
        policy: when and for how long.
    """

    def __init__(self, pool: WorkerPool, policy: QuarantinePolicy) -> None:
        self._pool = pool
        self._policy = policy
        self._paces: defaultdict[str, _Paces] = defaultdict(_Paces)
        self._failures: Counter[int] = Counter()
        self._times: Counter[int] = Counter()

    def answered(self, worker: int, seconds: float, work: Work) -> None:
        """A call of the worker's took ``seconds``."""
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
        """A call of the worker's was lost; whether the worker is suspected of losing whatever it is given.

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
        """Seconds that a call may take, whatever others do: 20 times the slowest recent one of its kind, by tokens.

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
        # It starts anew when it comes back, and no peer is compared with it until then.
        for paces in self._paces.values():
            paces.forget(worker)
        self._failures[worker] = 0
        return True


def _words(work: Work, seconds: float) -> str:
    return f"at {work.kind} for {seconds:.0f} s"


class _Paces:
    """Seconds a token that workers take for calls of one kind."""

    def __init__(self) -> None:
        self._longest = 0.0  # tokens of a call; one in flight whose tokens are not known is taken for such a one
        self._recent: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_CALLS))
        self._first: dict[int, float] = {}
        self._summary: _Summary | None = None  # of _recent as it stands; hundreds of calls in flight ask for it at once

    def add(self, worker: int, seconds: float, tokens: float) -> None:
        self._longest = max(self._longest, tokens)
        self._first.setdefault(worker, seconds)
        self._recent[worker].append(seconds / tokens)
        self._summary = None

    def restarted(self, worker: int) -> None:
        """Its next call is a process's first again."""
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
        """What a call in flight takes the worker's peers, None where that is not known.

        One call of theirs is enough: it was slower than those that follow, and one that hangs holds everything up.
        """
        peers = self._now.median_without(worker)
        return None if peers is None else (tokens or self._longest) * peers

    def slowest_seconds(self, tokens: float) -> float | None:
        """What a call takes at the slowest recent pace of any worker, first calls included; None if there was none."""
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
    """Of the recent seconds a token of all workers, one call of a worker's being enough.

    Attributes:
        of_worker: the median of each.
        rising: the same, in their order.
        slowest: of all calls; None where there are none.
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
