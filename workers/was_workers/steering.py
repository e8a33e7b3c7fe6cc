"""What ends or pauses a search from outside its loop: wishes in the database, limits, and ctrl-C."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from was_search.control import NOTHING_SPENT, Control, Ending, EndingKind, Limits, Spent, Tally, Usage, Wish
from was_search.errors import ResourceError
from was_search.pool_state import PoolState
from was_search.slots import Slot
from was_search.worker_range import WorkerRange
from was_workers.slot_book import durable

POLL_SECONDS = 1.0
BEAT_SECONDS = 5.0

_RANK = (EndingKind.STOPPED, EndingKind.DRAINED, EndingKind.CANCELLED)
"""A later one takes the place of an earlier one while calls in flight end."""

_logger = logging.getLogger(__name__)


class Desk(Protocol):
    """Where wishes lie and a run is written down: ``was_storage``'s ControlDesk."""

    def spent_before(self) -> Spent: ...

    def read(self) -> Control: ...

    def beat(self, usage: Usage) -> object: ...


class Resizable(Protocol):
    """What steering needs of the pool."""

    @property
    def state(self) -> PoolState: ...

    @property
    def n_loaded(self) -> int: ...

    @property
    def gpus_per_worker(self) -> float: ...

    def resize(self, n_workers: WorkerRange) -> None: ...


class Steering:
    """Knows whether the loop may hand out, and why it is to end.

    Args:
        desk: None where nobody can ask for anything; then only ``drain`` and those limits count that need no
            earlier runs' figures.
        pool: resized as asked.
        limits: of the run's own settings; what ``was-search set`` says goes before them.
        elsewhere: what other studies have spent of these limits.
        drain: set by ctrl-C.
        slots: of the study as the loop finds them.
        clock: seconds.
    """

    def __init__(
        self,
        desk: Desk | None,
        pool: Resizable,
        *,
        limits: Limits,
        drain: threading.Event,
        slots: Iterable[Slot],
        elsewhere: Spent = NOTHING_SPENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._elsewhere = self._shared = elsewhere
        self._desk = None if desk is None else durable(desk)
        self._pool = pool
        self._own_limits = self._limits = limits
        self._drain = drain
        self._tally = Tally.of(slots)
        self._clock = clock
        self._before = Spent() if self._desk is None else self._desk.spent_before()
        self._last = clock()
        self._next_read = self._next_beat = self._last
        self._seconds = self._gpu_seconds = self._worker_seconds = 0.0
        self._workers_asked: int | str | None = None
        self.paused = False
        self.activity = ""
        self.ending: Ending | None = None

    @property
    def open(self) -> bool:
        """Whether slots may be handed out."""
        return self.ending is None and not self.paused

    @property
    def cancelled(self) -> bool:
        return self.ending is not None and self.ending.kind is EndingKind.CANCELLED

    def finished(self, slot: Slot) -> None:
        """Count a slot that has just finished."""
        self._tally.add(slot)

    def steer(self) -> Control | None:
        """To be called at every turn of the loop; returns what is asked where it was read, about once a second."""
        self._account()
        control = None
        if self._drain.is_set():
            self._end(Ending(EndingKind.DRAINED, "interrupted"))
        if self._desk is not None and self._last >= self._next_read:
            control = self._desk.read()
            self._next_read = self._last + POLL_SECONDS
            self._obey(control)
        if rule := self._limits.met(self._spent(), self._tally, self._shared):
            self._end(Ending(EndingKind.STOPPED, rule))
        if self._last >= self._next_beat:
            self.beat()
        return control

    def beat(self) -> None:
        """Write down how the run goes."""
        if self._desk is None:
            return
        own = Spent(self._seconds, self._gpu_seconds)
        pool = self._pool.state
        self._desk.beat(Usage(own, self._worker_seconds, pool.placed, self.paused, pool, self.activity))
        self._next_beat = self._last + BEAT_SECONDS

    def _spent(self) -> Spent:
        return self._before + Spent(self._seconds, self._gpu_seconds)

    def _account(self) -> None:
        """Spread the time since the last turn over the counters."""
        now = self._clock()
        passed, self._last = now - self._last, now
        if not self.paused:
            self._seconds += passed
        if self._desk is not None:
            worker_seconds = passed * self._pool.n_loaded
            self._worker_seconds += worker_seconds
            self._gpu_seconds += worker_seconds * self._pool.gpus_per_worker

    def _obey(self, control: Control) -> None:
        self._limits = control.overrides.limits(self._own_limits)
        self._shared = control.overrides.shared(self._elsewhere)
        if control.wish is Wish.DRAIN:
            self._end(Ending(EndingKind.DRAINED))
        elif control.wish is Wish.CANCEL:
            self._end(Ending(EndingKind.CANCELLED))
        paused = control.wish is Wish.PAUSE
        if paused != self.paused:
            self.paused = paused
            self._next_beat = self._last
        self._resize(control.overrides.workers)

    def _resize(self, workers: int | str | None) -> None:
        if workers == self._workers_asked:
            return
        self._workers_asked = workers
        asked = self._pool.state.asked
        if workers is None or str(workers) == asked:
            return
        try:
            self._pool.resize(WorkerRange.parse(workers))
        except ResourceError as error:
            _logger.warning("the number of workers stays %s: %s", asked, error)
        self._next_beat = self._last

    def _end(self, ending: Ending) -> None:
        if self.ending is None or _RANK.index(ending.kind) > _RANK.index(self.ending.kind):
            self.ending = ending
