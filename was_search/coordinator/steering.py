"""What ends or pauses a search from outside its loop: wishes in the database, limits, and ctrl-C."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from was_search.coordinator.contracts import RunControl, WorkerPool
from was_search.coordinator.durable import durable
from was_search.errors import ResourceError
from was_search.studies.control import NOTHING_SPENT, Control, Ending, EndingKind, Limits, Spent, Tally, Usage, Wish
from was_search.studies.slots import Slot
from was_search.studies.worker_range import WorkerRange

POLL_SECONDS = 1.0
BEAT_SECONDS = 5.0

_RANK = (EndingKind.STOPPED, EndingKind.DRAINED, EndingKind.CANCELLED)
"""Endings by rank: while calls in flight end, a later one of this list replaces an earlier one."""

_logger = logging.getLogger(__name__)


class Steering:
    """Knows whether the loop may hand out, and why it is to end.

    Args:
        run_control: what is asked of the run; None where nobody can ask: then only ``drain`` counts, and limits that
            need no figures of earlier runs.
        pool: resized as asked.
        limits: those of the run's own settings; what ``was-search set`` says goes before them.
        elsewhere: what other studies of the command have spent of ``limits``.
        drain: set by ctrl-C.
        slots: the study's, as the loop finds them.
        clock: seconds.
    """

    def __init__(
        self,
        run_control: RunControl | None,
        pool: WorkerPool,
        *,
        limits: Limits,
        drain: threading.Event,
        slots: Iterable[Slot],
        elsewhere: Spent = NOTHING_SPENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._elsewhere = self._shared = elsewhere
        self._run_control = None if run_control is None else durable(run_control)
        self._pool = pool
        self._own_limits = self._limits = limits
        self._drain = drain
        self._tally = Tally.of(slots)
        self._clock = clock
        self._before = Spent() if self._run_control is None else self._run_control.spent_before()
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
        """Do what is asked, at every turn of the loop; returns what was read, about once a second, else None."""
        self._account()
        control = None
        if self._drain.is_set():
            self._end(Ending(EndingKind.DRAINED, "interrupted"))
        if self._run_control is not None and self._last >= self._next_read:
            control = self._run_control.read()
            self._next_read = self._last + POLL_SECONDS
            self._obey(control)
        if rule := self._limits.met(self._spent(), self._tally, self._shared):
            self._end(Ending(EndingKind.STOPPED, rule))
        if self._last >= self._next_beat:
            self.beat()
        return control

    def beat(self) -> None:
        """Write down how the run goes."""
        if self._run_control is None:
            return
        own = Spent(self._seconds, self._gpu_seconds)
        pool = self._pool.state
        self._run_control.beat(Usage(own, self._worker_seconds, pool.placed, self.paused, pool, self.activity))
        self._next_beat = self._last + BEAT_SECONDS

    def _spent(self) -> Spent:
        return self._before + Spent(self._seconds, self._gpu_seconds)

    def _account(self) -> None:
        """Spread the time since the last turn over the counters."""
        now = self._clock()
        passed, self._last = now - self._last, now
        if not self.paused:
            self._seconds += passed
        if self._run_control is not None:
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
