"""Independent calls spread over the workers, repeated where a worker dies, fails or is too slow."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from was_search.coordinator.calls import Call
from was_search.coordinator.contracts import LONGEST_CALL_SECONDS, Outcome, WorkerPool
from was_search.coordinator.lost_calls import LostCalls
from was_search.errors import TransientError
from was_search.process.logs import bound, bound_fields, event

T = TypeVar("T")
_logger = logging.getLogger(__name__)


def map_calls(
    pool: WorkerPool,
    calls: Sequence[Call[T]],
    *,
    phase: str = "",
    done: Callable[[], None] = lambda: None,
    max_attempts: int = 3,
    deadline_seconds: float = LONGEST_CALL_SECONDS,
) -> list[T]:
    """Results of ``calls`` in their order; lost ones are repeated, on other workers if possible.

    A worker that loses calls again and again, or is far slower than the others, is put in quarantine, and its call is
    given to another one. A call that takes far longer than those before it counts as lost.

    Args:
        pool: the workers.
        calls: one or more.
        phase: for the log, here and on the workers; "" for none.
        done: called after each result.
        max_attempts: attempts at one call; see :class:`was_search.coordinator.lost_calls.LostCalls`.
        deadline_seconds: time after which a call counts as lost; it may earlier, by
            :meth:`was_search.coordinator.health.Health.patience`.

    Raises:
        TransientError: a call was lost too often.
        Exception: what a call raised, where repeating it mends nothing.
    """
    with bound(**({"phase": phase} if phase else {})):
        return _Map(pool, calls, phase, done, max_attempts, deadline_seconds).run()


class _Map(Generic[T]):
    def __init__(
        self,
        pool: WorkerPool,
        calls: Sequence[Call[T]],
        phase: str,
        done: Callable[[], None],
        max_attempts: int,
        deadline_seconds: float,
    ) -> None:
        self._pool = pool
        self._calls = calls
        self._work = [call.work for call in calls]
        self._phase = phase
        self._done = done
        self._deadline_seconds = deadline_seconds
        self._waiting = deque(range(len(calls)))
        self._running: dict[int, int] = {}
        self._results: dict[int, T] = {}
        self._attempts: Counter[int] = Counter()
        self._lost = LostCalls(pool, max_attempts)

    def run(self) -> list[T]:
        started = time.monotonic()
        if self._phase:
            event(_logger, "phase begun", calls=len(self._calls))
        while len(self._results) < len(self._calls):
            while self._waiting and self._pool.n_idle:
                self._hand_out()
            self._pool.health.look({ticket: self._work[number] for ticket, number in self._running.items()})
            for outcome in self._pool.wait(1.0):
                if outcome.ticket in self._running:  # other calls were left in flight by a map or a search that raised
                    self._settle(self._running.pop(outcome.ticket), outcome)
        if self._phase:
            event(_logger, "phase ended", calls=len(self._calls), seconds=time.monotonic() - started)
        return [self._results[number] for number in range(len(self._calls))]

    def _hand_out(self) -> None:
        number = self._lost.next_for(self._pool.next_index, self._waiting)
        self._attempts[number] += 1
        about = None
        if self._phase:
            ids = {"part": number, "attempt": self._attempts[number], "worker": self._pool.next_idle}
            about = {**bound_fields(), **ids}
        ticket = self._pool.submit(self._calls[number], deadline_seconds=self._deadline_seconds, about=about)
        self._running[ticket] = number

    def _settle(self, number: int, outcome: Outcome) -> None:
        error = outcome.error
        if error is None:
            self._results[number] = outcome.value
            self._pool.health.answered(outcome.index, outcome.seconds, self._work[number])
            self._done()
            return
        if not outcome.lost and not isinstance(error, TransientError):
            raise error
        reason = f"{type(error).__name__}: {error}"
        if self._lost.lost(number, outcome, reason):
            name, times = self._calls[number].name, self._lost.count(number)
            if not outcome.lost:
                raise error
            raise TransientError(f"{name}: lost {times} times, last on {outcome.worker}: {error}")
        self._waiting.append(number)
