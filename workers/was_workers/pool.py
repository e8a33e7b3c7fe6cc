"""The pool: Ray actors that each hold a model, and calls that survive the loss of one."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

import ray

from was_search.coordinator.calls import Call, Shared
from was_search.coordinator.contracts import LONGEST_CALL_SECONDS, Outcome
from was_search.coordinator.health import Health, QuarantinePolicy
from was_search.coordinator.mapping import map_calls
from was_search.errors import ResourceError
from was_search.studies.pool_state import PoolState
from was_search.studies.worker_range import WorkerRange
from was_workers.calls_in_flight import CallsInFlight
from was_workers.cluster import Cluster, start_anew
from was_workers.local_ray import dead_process
from was_workers.members import PREPARE_SECONDS, Members
from was_workers.room import RoomWatch
from was_workers.shared import RayShared
from was_workers.size import Size, fitting
from was_workers.threads import ThreadShare
from was_workers.work_done import WorkDone
from was_workers.worker import Worker, WorkerInfo, WorkerSpec

T = TypeVar("T")

_DEATHS = 3
"""Deaths of a local Ray within :data:`_DEATHS_SECONDS` after which it is started again."""

_DEATHS_SECONDS = 600.0

_logger = logging.getLogger(__name__)


class Pool:
    """Actors, one call at a time on each. Used by one thread; closes with its context.

    ``submit`` needs an idle worker, ``wait`` returns what has ended. A worker that was lost gets a new process, and is
    idle again once that has loaded the model. Ray restarts no actor by itself (``max_restarts=0``), for then it does
    not say why one has died, and repeats no call (``max_task_retries=0``): the caller decides.

    The pool keeps its own size, in ``wait``: as many workers as are useful (:meth:`need`) within the range asked for.
    Where a process of a local Ray dies, the pool starts that anew.
    Those that the cluster has no place for yet stay pending, which is what Ray's autoscaler sees as demand. A worker on
    a node that is being drained gets no further call and goes once its call has ended, one in :meth:`quarantine` gets
    none for a while; others are started in their places.

    Args:
        cluster: from ``connect``.
        spec: what the workers load.
        n_workers: how many, or from how many to how many.
        gpus_per_worker: GPUs of each; fractions share a GPU.
        useful: at most this many workers have something to do, until :meth:`need` says otherwise.
        divide_threads: share this machine's processors equally, again whenever the number of workers changes.
        policy: when a worker is put in quarantine; None for the usual one.

    Attributes:
        health: of the workers; whoever hands calls out tells it how they ended.
        work_done: what the workers have done so far.
    """

    def __init__(
        self,
        cluster: Cluster,
        spec: WorkerSpec,
        *,
        n_workers: WorkerRange | int,
        gpus_per_worker: float,
        useful: int | None = None,
        divide_threads: bool = False,
        policy: QuarantinePolicy | None = None,
    ) -> None:
        self._cluster = cluster
        self._gpus_per_worker = gpus_per_worker
        asked = fitting(_as_range(n_workers), cluster, gpus_per_worker)
        # A local Ray is ours alone and counts the processors it was started with: it must not keep a worker waiting.
        actor_class = ray.remote(Worker).options(
            num_cpus=0 if cluster.local else 1, num_gpus=gpus_per_worker, max_restarts=0, max_task_retries=0
        )
        threads = ThreadShare(spec.threads, divided=divide_threads)
        self._calls = CallsInFlight()
        self._members = Members(
            self._calls,
            lambda number: actor_class.remote(dataclasses.replace(spec, threads=threads.each), number),
            threads=threads,
            goes=lambda node: self._size.goes(node),
        )
        self._room = RoomWatch(gpus_per_worker)
        self._size = Size(self._members, cluster, asked, math.inf if useful is None else useful)
        self._next_ticket = 0
        self._shared: WeakSet[RayShared[Any]] = WeakSet()
        self._deaths: list[float] = []
        self._starting = False
        self.work_done = WorkDone()
        self.health = Health(self, policy or QuarantinePolicy())
        self._size.keep()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the actors; calls in flight are lost."""
        self._members.close(kill=not self._dead)

    def resize(self, n_workers: WorkerRange | int) -> None:
        """Start workers, or let some go, until there are ``n_workers``; returns at once and loses no call.

        Those go first that have no place yet, then those that load, then idle ones, then busy ones, each once its
        call has ended.

        Raises:
            ResourceError: a local machine lacks the GPUs for ``n_workers``; nothing is changed.
        """
        self._size.asked = fitting(_as_range(n_workers), self._cluster, self._gpus_per_worker)
        self._members.forgive()
        self._size.keep()

    def need(self, n: int) -> None:
        """Say that no more than ``n`` workers have something to do."""
        self._size.useful = n

    def abandon(self) -> None:
        """Kill every call in flight; its ticket never comes back. The workers load their model again."""
        for call in self._calls.running:
            if call.member.going:
                self._members.let_go(call.member)
            else:
                self._members.restart(call.member)
        self._members.outcomes.clear()

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        """Give the worker ``index`` no call for ``seconds``; returns whether that was done.

        Its call in flight comes back as lost, and counts against nobody. The worker keeps its place, so that no other
        lands on a sick GPU, and another one is started if the cluster has room. When its time is up it is restarted and
        released, or let go where enough others are there. The last worker that is ready is never put in quarantine,
        and where all others have gone the first of those in quarantine is released.
        """
        member = next((m for m in self._members.staying if m.index == index), None)
        if member is None or not any(other.ready for other in self._members.staying if other is not member):
            return False
        self._members.quarantine(member, reason, seconds)
        self._size.look_soon()
        return True

    def give_up(self, ticket: int, reason: str) -> None:
        """Count a call that hangs as lost: it comes back so, and its worker loads the model again."""
        self._members.give_up(ticket, reason)

    @property
    def n_workers(self) -> int:
        """Number of workers, loaded or not, without those that are about to go or in quarantine."""
        return self._size.n_workers

    @property
    def n_parallel(self) -> int:
        """Number of parts to cut work into: workers that have a place, or will have one soon."""
        return max(1, min(self.n_workers, self._size.asked.least), self.state.placed)

    @property
    def n_loaded(self) -> int:
        """Number of workers that hold the model, with those that are about to go or in quarantine."""
        return len(self.infos)

    @property
    def gpus_per_worker(self) -> float:
        return self._gpus_per_worker

    @property
    def n_idle(self) -> int:
        return len(self._members.idle)

    @property
    def next_idle(self) -> str:
        """Name of the worker that the next ``submit`` takes."""
        return self._members.idle[0].name

    @property
    def idle_names(self) -> list[str]:
        """Names of the idle workers in the order that ``submit`` takes them."""
        return [member.name for member in self._members.idle]

    @property
    def next_index(self) -> int:
        """Number of the worker that the next ``submit`` takes."""
        return self._members.idle[0].index

    @property
    def proven(self) -> frozenset[int]:
        """Numbers of the workers that have held the model, without those that are about to go or in quarantine."""
        return frozenset(member.index for member in self._members.staying if member.info is not None)

    @property
    def infos(self) -> list[WorkerInfo]:
        """What the workers said that have loaded their model so far."""
        return [member.info for member in self._members.all if member.info is not None]

    @property
    def state(self) -> PoolState:
        """How many workers are doing what."""
        return self._size.state

    @property
    def running(self) -> list[tuple[int, int, float]]:
        """Ticket, worker's index and seconds so far, of every call in flight."""
        return [(call.ticket, call.member.index, call.seconds) for call in self._calls.running]

    def share(self, value: T) -> Shared[T]:
        """``value`` for many calls: it goes to each machine once, and to a worker as long as its calls carry it."""
        self._heal()
        shared = RayShared.put(value)
        self._shared.add(shared)
        self.work_done.shared(shared.reference)
        return shared

    def submit(
        self,
        call: Call[Any],
        *,
        deadline_seconds: float = LONGEST_CALL_SECONDS,
        about: Mapping[str, Any] | None = None,
    ) -> int:
        """Start ``call`` on the worker that ``next_idle`` names; returns its ticket.

        ``about`` are ids for the worker's log.
        """
        ticket = self._next_ticket
        self._next_ticket += 1
        member = self._members.idle.popleft()
        reference = member.actor.run.remote(call, None if about is None else dict(about))
        self._calls.start(member, ticket, reference, deadline_seconds)
        return ticket

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Calls that have ended, after at most ``timeout_seconds``; [] if none has.

        Raises:
            WasError: a worker cannot load its model.
            ResourceError: every worker has been given up.
        """
        self.turn(0.0 if self._members.outcomes else timeout_seconds)
        outcomes, self._members.outcomes = self._members.outcomes, []
        return outcomes

    def turn(self, timeout_seconds: float) -> None:
        """Wait for calls as :meth:`wait` does, but keep what has ended for the next :meth:`wait`."""
        self._heal()
        for call in self._calls.wait(timeout_seconds):
            if (ending := self._calls.take(call)) is not None:
                self.work_done.ended(ending)
                self._members.settle(ending)
        self._members.turn()
        if self._size.due or not self._members.all:
            self._size.keep()
            self._look_for_room()
        if not self._members.all:
            raise ResourceError(self._members.all_lost)

    def _look_for_room(self) -> None:
        """Say that workers find no place on a cluster; a local machine without room was refused.

        Raises:
            ResourceError: the run has not begun yet, and never could.
        """
        if not self._cluster.local:
            waiting = self._members.waiting_seconds
            self._room.look(self._size.asked, self.state.placed, waiting, starting=self._starting)

    @property
    def _dead(self) -> str:
        """What of a local Ray has died; "" for nothing, and for clusters, which others look after."""
        return dead_process() if self._cluster.local else ""

    def _heal(self) -> None:
        """Start a new local Ray where a process of it has died, and lose no more than the calls in flight.

        Raises:
            ResourceError: it has died too often, or cannot be started again.
        """
        if not (died := self._dead):
            return
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < _DEATHS_SECONDS] + [now]
        if len(self._deaths) > _DEATHS:
            raise ResourceError(
                f"ray: the local Ray has died {len(self._deaths)} times within {_DEATHS_SECONDS / 60:.0f} minutes; the "
                f"last time, {died}; if the system does that for lack of memory, 'dmesg' says so; the same command "
                "goes on from here"
            )
        _logger.warning("the local Ray is started again, and the workers load the model again: %s", died)
        self._members.lose_all(f"the local Ray has died: {died}")
        for shared in self._shared:
            shared.forget()
        start_anew(self._cluster)
        for shared in self._shared:
            shared.put_again()

    def wait_idle(self, timeout_seconds: float = PREPARE_SECONDS) -> None:
        """Block until a worker is idle.

        Raises:
            ResourceError: none became ready in time.
        """
        self._wait_for(lambda: self.n_idle > 0, "no worker had loaded its model within", timeout_seconds)

    def wait_for_least(self, timeout_seconds: float = PREPARE_SECONDS) -> None:
        """Block until the least number of workers asked for is ready; where a fixed number was asked for, until one is.

        Raises:
            ResourceError: they did not become ready in time.
        """
        asked = self._size.asked
        if asked.fixed:
            self.wait_idle(timeout_seconds)
            return
        few = f"fewer than {asked.least} workers had loaded their model within"
        self._wait_for(lambda: self.state.ready >= asked.least, few, timeout_seconds)

    def map(
        self, calls: Sequence[Call[T]], *, phase: str = "", done: Callable[[], None] = lambda: None, **options: Any
    ) -> list[T]:
        """Results of ``calls`` in their order; see :func:`was_search.coordinator.mapping.map_calls`."""
        return map_calls(self, calls, phase=phase, done=done, **options)

    def _wait_for(self, there: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        started = time.monotonic()
        self._starting = True
        try:
            while not there():
                if time.monotonic() - started > timeout_seconds:
                    reason = self._members.last_loss or "are there enough free resources?"
                    raise ResourceError(f"{what} {timeout_seconds:.0f} s; {reason}")
                self.turn(1.0)
        finally:
            self._starting = False


def _as_range(n_workers: WorkerRange | int) -> WorkerRange:
    return n_workers if isinstance(n_workers, WorkerRange) else WorkerRange(n_workers, n_workers)
