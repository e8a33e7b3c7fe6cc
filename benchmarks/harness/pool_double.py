"""A pool of workers without Ray, for benchmarks and tests: its calls end in ``wait``, when and how they say."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from was_search.coordinator.calls import Call, Held
from was_search.coordinator.contracts import LONGEST_CALL_SECONDS, Outcome
from was_search.coordinator.health import Health, QuarantinePolicy
from was_search.coordinator.mapping import map_calls
from was_search.errors import ResourceError, TransientError
from was_search.studies.pool_state import PoolState, Quarantined
from was_search.studies.worker_range import WorkerRange

if TYPE_CHECKING:
    from was_search.coordinator.contracts import WorkerPool

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Given:
    """A call in flight, with its worker and the moments of its start and of its deadline."""

    ticket: int
    call: Call[Any]
    index: int
    worker: str
    about: Mapping[str, Any] | None
    started: float
    deadline: float


def run_here(given: Given) -> Any:
    """The call's own result, without a model."""
    return given.call.run(None)  # type: ignore[arg-type]


def first(running: Sequence[Given]) -> Sequence[Given]:
    """The call that was started before all others."""
    return running[:1]


class PoolDouble:
    """A ``WorkerPool`` in this process.

    A worker whose call was lost is back at once; one in quarantine keeps its place. Of a range asked for there are as
    many workers as have something to do.

    Args:
        answer: what a call returns; it raises ConnectionError where the call is lost, and else what the call raises.
        n_workers: how many at the start.
        due: which of the calls in flight, in the order of their start, end at this ``wait``.
        policy: when a worker is put in quarantine; None for the usual one.
        gpus_per_worker: as it says of itself.
        most: there is no room for more workers.
        name: of every worker, before its number.
        clock: seconds.

    Attributes:
        given: the calls in flight by ticket.
        n_submitted: calls that were started.
        abandoned: times that calls in flight were abandoned.
        put: number, reason and seconds of every quarantine.
        given_up: ticket and reason of every call that was given up.
        sizes: those asked for.
        needed: the last need.
    """

    def __init__(
        self,
        answer: Callable[[Given], Any] = run_here,
        n_workers: int = 2,
        *,
        due: Callable[[Sequence[Given]], Sequence[Given]] = first,
        policy: QuarantinePolicy | None = None,
        gpus_per_worker: float = 0.0,
        most: int | None = None,
        name: str = "worker",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.answer = answer
        self.due = due
        self.gpus_per_worker = gpus_per_worker
        self.health = Health(self, policy or QuarantinePolicy())
        self.given: dict[int, Given] = {}
        self.n_submitted = 0
        self.abandoned = 0
        self.put: list[tuple[int, str, float]] = []
        self.given_up: list[tuple[int, str]] = []
        self.sizes: list[str] = []
        self.needed: int | None = None
        self._most = most
        self._name = name
        self._clock = clock
        self._asked = WorkerRange(n_workers, n_workers)
        self._idle = deque(range(n_workers))
        self._staying = frozenset(range(n_workers))
        self._going: set[int] = set()
        self._quarantined: dict[int, tuple[float, Quarantined]] = {}
        self._next_index = n_workers
        self._next_deadline = inf
        self._lost: list[Outcome] = []

    @property
    def state(self) -> PoolState:
        quarantined = tuple(each for _, each in self._quarantined.values())
        return PoolState(str(self._asked), ready=len(self._staying), draining=len(self._going), quarantined=quarantined)

    @property
    def n_loaded(self) -> int:
        return len(self._staying) + len(self._going) + len(self._quarantined)

    @property
    def n_parallel(self) -> int:
        return max(1, len(self._staying))

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    @property
    def idle_names(self) -> list[str]:
        return [self._name_of(index) for index in self._idle]

    @property
    def next_idle(self) -> str:
        return self._name_of(self._idle[0])

    @property
    def next_index(self) -> int:
        return self._idle[0]

    @property
    def proven(self) -> frozenset[int]:
        return self._staying

    @property
    def running(self) -> list[tuple[int, int, float]]:
        now = self._clock()
        return [(given.ticket, given.index, now - given.started) for given in self.given.values()]

    def share(self, value: T) -> Held[T]:
        return Held(value)

    def submit(
        self,
        call: Call[Any],
        *,
        deadline_seconds: float = LONGEST_CALL_SECONDS,
        about: Mapping[str, Any] | None = None,
    ) -> int:
        now, index, ticket = self._clock(), self._idle.popleft(), self.n_submitted
        self.n_submitted += 1
        given = Given(ticket, call, index, self._name_of(index), about, now, now + deadline_seconds)
        self.given[ticket] = given
        self._next_deadline = min(self._next_deadline, given.deadline)
        return ticket

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        self._release_in_time()
        ended = [self._end(given) for given in self._due(0.0 if self._lost else timeout_seconds)]
        self._lose_overdue()
        lost, self._lost = self._lost, []
        return lost + ended

    def map(self, calls: Sequence[Call[T]], *, phase: str = "", done: Callable[[], None] = lambda: None) -> list[T]:
        return map_calls(self, calls, phase=phase, done=done)

    def need(self, n: int) -> None:
        self.needed = n
        self._keep_size()

    def resize(self, n_workers: WorkerRange) -> None:
        if self._most is not None and n_workers.least > self._most:
            raise ResourceError(f"there is room for {self._most} workers")
        self.sizes.append(str(n_workers))
        self._asked = n_workers
        self._keep_size()

    def abandon(self) -> None:
        self.abandoned += 1
        for given in self.given.values():
            self._free(given.index)
        self.given.clear()
        self._lost.clear()

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        if index not in self._staying or len(self._staying) == 1:
            return False
        self._staying -= {index}
        self._quarantined[index] = self._clock() + seconds, Quarantined(self._name_of(index), reason, "")
        self.put.append((index, reason, seconds))
        if index in self._idle:
            self._idle.remove(index)
        for given in [given for given in self.given.values() if given.index == index]:
            error = TransientError(f"taken off {given.worker}, which is in quarantine: {reason}")
            self._lose(given, error, blameless=True)
        return True

    def give_up(self, ticket: int, reason: str) -> None:
        self.given_up.append((ticket, reason))
        if given := self.given.get(ticket):
            self._lose(given, TransientError(f"no answer from {given.worker}, {reason}"))

    def release(self, index: int) -> None:
        """Take a worker out of quarantine before its time."""
        del self._quarantined[index]
        self._staying |= {index}
        self._idle.append(index)

    def lose_for_good(self) -> None:
        """Take an idle worker away, which does not come back: the last one in order."""
        self._staying -= {self._idle.pop()}

    def _due(self, timeout_seconds: float) -> Sequence[Given]:
        """The calls that end now, or within the timeout."""
        due = self.due(list(self.given.values()))
        if not due:
            time.sleep(min(timeout_seconds, 0.01))
        return due

    def _name_of(self, index: int) -> str:
        return f"{self._name}-{index}"

    def _end(self, given: Given) -> Outcome:
        del self.given[given.ticket]
        value, error = None, None
        try:
            value = self.answer(given)
        except Exception as raised:
            error = raised
        self._free(given.index)
        lost = isinstance(error, ConnectionError)
        return self._outcome(given, value=value, error=error, lost=lost)

    def _lose(self, given: Given, error: Exception, *, blameless: bool = False) -> None:
        del self.given[given.ticket]
        self._free(given.index)
        self._lost.append(self._outcome(given, error=error, lost=True, blameless=blameless))

    def _outcome(self, given: Given, **how: Any) -> Outcome:
        seconds = self._clock() - given.started
        return Outcome(given.ticket, given.worker, index=given.index, seconds=seconds, **how)

    def _free(self, index: int) -> None:
        if index in self._staying:
            self._idle.append(index)
        self._going.discard(index)

    def _release_in_time(self) -> None:
        for index in [index for index, (end, _) in self._quarantined.items() if self._clock() >= end]:
            self.release(index)

    def _lose_overdue(self) -> None:
        now = self._clock()
        if now <= self._next_deadline:
            return
        for given in [given for given in self.given.values() if now > given.deadline]:
            self._lose(given, TransientError(f"no answer from {given.worker} before the deadline"))
        self._next_deadline = min((given.deadline for given in self.given.values()), default=inf)

    def _keep_size(self) -> None:
        useful = self._asked.most if self.needed is None else self.needed
        n = min(max(self._asked.least, useful), self._asked.most)
        while len(self._staying) + len(self._quarantined) < n:
            self._staying |= {self._next_index}
            self._idle.append(self._next_index)
            self._next_index += 1
        while len(self._staying) > max(1, n - len(self._quarantined)):  # idle ones first
            index = self._idle.pop() if self._idle else max(self._staying)
            self._staying -= {index}
            if any(given.index == index for given in self.given.values()):
                self._going.add(index)


if TYPE_CHECKING:
    _: type[WorkerPool] = PoolDouble
