"""What the coordinator needs: workers that take calls, storage that keeps slots, and what is asked of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from was_search.coordinator.calls import Call, Shared
from was_search.studies.control import Control, Spent, Usage
from was_search.studies.hand_outs import HandOut, Result
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import Slot
from was_search.studies.worker_range import WorkerRange

if TYPE_CHECKING:
    from was_search.coordinator.health import Health

T = TypeVar("T")

LONGEST_CALL_SECONDS = 86400.0
"""Longest time of a call without its own limit; the only limit of calls of a kind not seen yet."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        ticket: the call's.
        worker: its worker's name.
        value: what it returned.
        error: what it raised.
        lost: the worker died, missed its deadline or was taken off the call, which may be repeated.
        blameless: the call was lost for no fault of its own: its node was taken away, or its worker is in quarantine.
        index: the worker's number, which outlasts restarts; -1 where there is none.
        seconds: from its start until its end was seen.
    """

    ticket: int
    worker: str
    value: Any = None
    error: BaseException | None = None
    lost: bool = False
    blameless: bool = False
    index: int = -1
    seconds: float = 0.0


class WorkerPool(Protocol):
    """Workers that take one call at a time. Used by one thread; it repeats no call by itself.

    A worker that is lost becomes idle again once it is back; its number outlasts that. ``was_workers.pool.Pool`` is
    this contract on Ray.
    """

    @property
    def health(self) -> Health:
        """The workers' health; whoever hands calls out tells it how they ended."""
        ...

    @property
    def state(self) -> PoolState:
        """How many workers are doing what."""
        ...

    @property
    def n_loaded(self) -> int:
        """Number of workers that hold the model, with those that are about to go or in quarantine."""
        ...

    @property
    def n_parallel(self) -> int:
        """Number of parts to cut work into."""
        ...

    @property
    def gpus_per_worker(self) -> float: ...

    @property
    def n_idle(self) -> int: ...

    @property
    def idle_names(self) -> list[str]:
        """Names of the idle workers in the order that :meth:`submit` takes them."""
        ...

    @property
    def next_idle(self) -> str:
        """Name of the worker that the next :meth:`submit` takes."""
        ...

    @property
    def next_index(self) -> int:
        """Number of the worker that the next :meth:`submit` takes."""
        ...

    @property
    def proven(self) -> Set[int]:
        """Numbers of the workers that have held the model, without those that are about to go or in quarantine."""
        ...

    @property
    def running(self) -> list[tuple[int, int, float]]:
        """Ticket, worker's number and seconds so far of every call in flight."""
        ...

    def share(self, value: T) -> Shared[T]:
        """``value`` for many calls, sent to each worker once."""
        ...

    def submit(
        self,
        call: Call[Any],
        *,
        deadline_seconds: float = LONGEST_CALL_SECONDS,
        about: Mapping[str, Any] | None = None,
    ) -> int:
        """Start ``call`` on an idle worker, of which there must be one; returns its ticket, which no other call has.

        Args:
            call: what to do.
            deadline_seconds: time after which it counts as lost, unless its reply is there by the time of the first
                :meth:`wait` after it.
            about: ids for the worker's log.
        """
        ...

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Calls that have ended, each once, after at most ``timeout_seconds``; [] if none has.

        Raises:
            WasError: a worker cannot load its model.
            ResourceError: every worker has been given up.
        """
        ...

    def map(self, calls: Sequence[Call[T]], *, phase: str = "", done: Callable[[], None] = ...) -> list[T]:
        """Results of ``calls`` in their order; see :func:`was_search.coordinator.mapping.map_calls`."""
        ...

    def need(self, n: int) -> None:
        """Say that no more than ``n`` workers have something to do."""
        ...

    def resize(self, n_workers: WorkerRange) -> None:
        """Start workers, or let some go, until there are ``n_workers``; returns at once and loses no call.

        Raises:
            ResourceError: there is no room for ``n_workers``; nothing is changed.
        """
        ...

    def abandon(self) -> None:
        """End every call in flight; its ticket never comes back."""
        ...

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        """Give the worker ``index`` no call for ``seconds``; False where that was refused, as for the last worker.

        Its call in flight comes back as lost, and counts against nobody.
        """
        ...

    def give_up(self, ticket: int, reason: str) -> None:
        """Count a call that hangs as lost: it comes back so."""
        ...


class SlotStore(Protocol):
    """A study's slots in storage. Every method may be repeated: it finishes what was begun.

    ``was_storage.studies.session.CoordinatorSession`` is this contract on Postgres.
    """

    def slots(self) -> list[Slot]: ...

    def begin(self, hand_outs: Sequence[HandOut], lease_seconds: float) -> list[int]:
        """Write down that slots are handed out, with their vectors; returns the attempts' numbers."""
        ...

    def trial_of(self, number: int) -> int | None: ...

    def shrink(self, n_slots: int) -> int: ...

    def requeue(self, number: int, reason: str) -> object: ...

    def finish_all(self, results: Sequence[Result]) -> list[bool]: ...


class RunControl(Protocol):
    """Where others ask something of a run, and where it writes how it goes; calls may be repeated.

    ``was_storage.studies.control.ControlSession`` is this contract on Postgres.
    """

    def spent_before(self) -> Spent: ...

    def read(self) -> Control: ...

    def beat(self, usage: Usage) -> object: ...
