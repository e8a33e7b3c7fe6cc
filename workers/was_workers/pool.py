"""The pool: Ray actors that each hold a model, and calls that survive the loss of one."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayError, RayTaskError, RuntimeEnvSetupError

from was_search import __version__
from was_search.errors import DeviceLostError, ResourceError, TransientError
from was_search.pool_state import PoolState
from was_search.worker_range import WorkerRange
from was_workers.cluster import Cluster
from was_workers.draining import draining_nodes
from was_workers.members import PLACE, PREPARE, Call, Member, Outcome, Quarantine
from was_workers.worker import Worker, WorkerInfo, WorkerSpec

__all__ = ["Outcome", "Pool"]

_logger = logging.getLogger(__name__)

_RECOVERIES = 8
"""Failures in a row to become ready before a worker is given up."""

_PREPARE_SECONDS = 3600.0
"""For a worker to load its model; a hub id may have to be downloaded."""

_LOOK_SECONDS = 0.5
"""Between two looks at the pool's own size."""

_DRAIN_SECONDS = 2.0
"""Between two looks for nodes that are about to go."""

_GIVEN_UP_SECONDS = 600.0
"""After which the place of a worker that was given up is tried again."""


class Pool:
    """Actors, one call at a time on each. Used by one thread; closes with its context.

    ``submit`` needs an idle worker, ``wait`` returns what has ended. Actors restart by themselves
    (``max_restarts=-1``); a worker that was lost becomes idle again once it has loaded its model. Calls are never
    repeated by Ray (``max_task_retries=0``): the caller decides.

    The pool keeps its own size, in ``wait``: as many workers as are useful (:meth:`need`) within the range asked for.
    Those that the cluster has no place for yet stay pending, which is what Ray's autoscaler sees as demand. A worker on
    a node that is being drained gets no further call and goes once its call has ended, one in :meth:`quarantine` gets
    none for a while; others are started in their places.

    Args:
        cluster: from ``connect``.
        spec: what the workers load.
        n_workers: how many, or from how many to how many.
        gpus_per_worker: GPUs of each; fractions share a GPU.
        useful: at most so many have something to do; until :meth:`need` says otherwise.
        divide_threads: give each an equal share of this machine's processors, again whenever their number changes.
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
    ) -> None:
        self._cluster = cluster
        self._gpus_per_worker = gpus_per_worker
        self._range = self._fitting(_as_range(n_workers))
        self._useful: float = math.inf if useful is None else useful
        self._divide_threads = divide_threads
        self._threads = spec.threads
        # A local Ray is ours alone and counts the processors it was started with: it must not keep a worker waiting.
        actor_class = ray.remote(Worker).options(
            num_cpus=0 if cluster.local else 1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=0
        )
        self._new_actor: Callable[[], Any] = lambda: actor_class.remote(
            dataclasses.replace(spec, threads=self._threads)
        )
        self._members: list[Member] = []
        self._next_index = 0
        self._idle: deque[Member] = deque()
        self._calls: dict[Any, Call] = {}
        self._next_ticket = 0
        self._ready: list[Outcome] = []
        self._recovering: list[tuple[float, Member]] = []
        self._given_up: list[float] = []
        self._last_loss = ""
        self._next_look = self._next_drain_look = 0.0
        self._draining: dict[str, float] = {}
        self._keep_size()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the actors; calls in flight are lost."""
        for member in self._members:
            ray.kill(member.actor, no_restart=True)
        self._members.clear()
        self._idle.clear()
        self._calls.clear()

    def resize(self, n_workers: WorkerRange | int) -> None:
        """Start workers, or let some go, until there are so many; returns at once and loses no call.

        Those go first that have no place yet, then those that load, then idle ones, then busy ones, each of these
        once its call has ended.

        Raises:
            ResourceError: a local machine lacks the GPUs for so many; nothing is changed.
        """
        self._range = self._fitting(_as_range(n_workers))
        self._given_up.clear()
        self._keep_size()

    def need(self, n: int) -> None:
        """Say that no more than ``n`` workers have something to do."""
        self._useful = n

    def abandon(self) -> None:
        """Kill every call in flight; its ticket never comes back. The workers load their model again."""
        for call in list(self._calls.values()):
            if call.ticket < 0:
                continue
            if call.member.going:
                self._let_go(call.member)
            else:
                self._restart(call.member)
        self._ready.clear()

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        """Give the worker ``index`` no call for ``seconds``; whether that was done.

        A call that it is at comes back as lost, and blameless. It keeps its place, so that no other worker lands on a
        sick GPU, and another one is started if the cluster has room. When its time is up it is restarted and
        released, or let go where enough others are there. The last worker that is ready is never put in quarantine,
        and where all others have gone the first of those in quarantine is released.
        """
        member = next((m for m in self._members if m.index == index), None)
        others = [m for m in self._members if m.stays and m.ready and m is not member]
        if member is None or not member.stays or not others:
            return False
        member.quarantine = Quarantine(reason, time.monotonic() + seconds, datetime.now(UTC))
        if member in self._idle:
            self._idle.remove(member)
        for reference, call in list(self._calls.items()):
            if call.member is member and call.ticket >= 0:
                del self._calls[reference]
                error = TransientError(f"taken off {member.name}, which is in quarantine: {reason}")
                self._end(call, error=error, lost=True, blameless=True)
        _logger.warning("%s is in quarantine for %.0f s: %s", member.name, seconds, reason)
        self._next_look = 0.0
        return True

    @property
    def n_workers(self) -> int:
        """Workers there are, loaded or not; those left out that are about to go or in quarantine."""
        return sum(member.stays for member in self._members)

    @property
    def n_parallel(self) -> int:
        """Into how many parts work is well cut: workers that have a place, at least as many as will soon."""
        state = self.state
        return max(1, min(self.n_workers, self._range.least), state.placed)

    @property
    def n_loaded(self) -> int:
        """Workers that hold the model, those that are about to go or in quarantine included."""
        return len(self.infos)

    @property
    def gpus_per_worker(self) -> float:
        return self._gpus_per_worker

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    @property
    def next_idle(self) -> str:
        """Name of the worker that the next ``submit`` takes."""
        return self._idle[0].name

    @property
    def idle_names(self) -> list[str]:
        """Names of the idle workers in the order that ``submit`` takes them."""
        return [member.name for member in self._idle]

    @property
    def infos(self) -> list[WorkerInfo]:
        """Workers that have loaded their model so far."""
        return [member.info for member in self._members if member.info is not None]

    @property
    def state(self) -> PoolState:
        """The workers by what they are at."""
        stay = [member for member in self._members if member.stays]
        ready = sum(member.ready for member in stay)
        pending = sum(member.place is None for member in stay)
        return PoolState(
            asked=str(self._range),
            ready=ready,
            loading=len(stay) - ready - pending,
            pending=pending,
            draining=sum(member.going for member in self._members),
            quarantined=tuple(m.shown for m in self._members if m.quarantine is not None and not m.going),
        )

    @property
    def running(self) -> list[tuple[int, int, float]]:
        """Ticket, worker's index and seconds so far of every call in flight."""
        now = time.monotonic()
        return [(c.ticket, c.member.index, now - c.started) for c in self._calls.values() if c.ticket >= 0]

    def submit(self, method: str, *args: Any, deadline_seconds: float = 3600.0) -> int:
        """Start ``method`` on the worker that ``next_idle`` names; returns the call's ticket."""
        member = self._idle.popleft()
        ticket = self._next_ticket
        self._next_ticket += 1
        self._start(member, ticket, method, args, deadline_seconds)
        return ticket

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Calls that ended, at the latest after ``timeout_seconds``; may be none.

        Raises:
            WasError: a worker cannot load its model.
            ResourceError: every worker has been given up.
        """
        if self._calls:
            ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout_seconds)
            if ready:  # take all that are there, without waiting
                ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            for reference in ready:
                if reference in self._calls:  # a worker that was let go takes its calls with it
                    self._settle(reference, self._calls.pop(reference))
        else:
            time.sleep(min(timeout_seconds, 0.25))
        self._expire()
        self._recover()
        if time.monotonic() >= self._next_look or not self._members:
            self._keep_size()
        if not self._members:
            raise ResourceError(f"every worker was lost and could not be restarted; the last error: {self._last_loss}")
        outcomes, self._ready = self._ready, []
        return outcomes

    def wait_idle(self, timeout_seconds: float = _PREPARE_SECONDS) -> None:
        """Block until a worker is idle.

        Raises:
            ResourceError: none became ready in time.
        """
        self._wait_for(lambda: len(self._idle) > 0, "no worker had loaded its model within", timeout_seconds)

    def wait_for_least(self, timeout_seconds: float = _PREPARE_SECONDS) -> None:
        """Block until the least number of workers that was asked for is ready; of a fixed number, one is enough.

        Raises:
            ResourceError: they were not in time.
        """
        if self._range.fixed:
            self.wait_idle(timeout_seconds)
            return
        few = f"fewer than {self._range.least} workers had loaded their model within"
        self._wait_for(lambda: self.state.ready >= self._range.least, few, timeout_seconds)

    def map(
        self,
        calls: Sequence[tuple[Any, ...]],
        *,
        done: Callable[[], None] = lambda: None,
        max_attempts: int = 3,
        deadline_seconds: float = 3600.0,
    ) -> list[Any]:
        """Results of ``calls``, each (method, *args), in their order; lost ones are repeated.

        Raises:
            TransientError: a call was lost ``max_attempts`` times.
        """
        waiting = deque(enumerate(calls))
        attempts = [0] * len(calls)
        results: list[Any] = [None] * len(calls)
        running: dict[int, int] = {}
        left = len(calls)
        while left:
            while waiting and self._idle:
                index, call = waiting.popleft()
                attempts[index] += 1
                ticket = self.submit(*call, deadline_seconds=deadline_seconds)
                running[ticket] = index
            for outcome in self.wait(1.0):
                if outcome.ticket not in running:
                    continue  # left in flight by a map or a search that raised
                index = running.pop(outcome.ticket)
                attempts[index] -= outcome.blameless
                if outcome.error is None:
                    results[index] = outcome.value
                    left -= 1
                    done()
                elif (outcome.lost or isinstance(outcome.error, TransientError)) and attempts[index] < max_attempts:
                    waiting.append((index, calls[index]))
                elif outcome.lost:
                    raise TransientError(
                        f"{calls[index][0]}: lost {max_attempts} times, last on {outcome.worker}: {outcome.error}"
                    )
                else:
                    raise outcome.error
        return results

    def _wait_for(self, there: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        end = time.monotonic() + timeout_seconds
        while not there():
            if time.monotonic() > end:
                raise ResourceError(f"{what} {timeout_seconds:.0f} s; are there enough free resources?")
            self._ready = self.wait(1.0)

    def _fitting(self, asked: WorkerRange) -> WorkerRange:
        """``asked`` as far as this machine has room, where the workers must be on it.

        Raises:
            ResourceError: not even for the least of them.
        """
        if not self._cluster.local:
            return asked
        gpus = self._gpus_per_worker
        if asked.least * gpus > self._cluster.gpus + 1e-9:
            raise ResourceError(
                f"{asked.least} worker(s) with {gpus:g} GPU each were asked for and this machine has "
                f"{self._cluster.gpus:g}; lower --workers or --gpus-per-worker, or use --device cpu"
            )
        room = int((self._cluster.gpus + 1e-9) / gpus) if gpus else (os.cpu_count() or 1)
        return WorkerRange(asked.least, max(asked.least, min(asked.most, room)))

    def _keep_size(self) -> None:
        """Start and let go workers until there are as many as are wanted now."""
        now = time.monotonic()
        self._next_look = now + _LOOK_SECONDS
        if now >= self._next_drain_look:
            self._notice_draining()
        self._given_up = [at for at in self._given_up if now - at < _GIVEN_UP_SECONDS]
        wanted = self._range.clamp(int(min(self._useful, self._range.most))) - len(self._given_up)
        self._release_from_quarantine(wanted)
        self._share_threads(wanted + sum(m.quarantine is not None for m in self._members))
        for member in self._members:  # those that have not gone yet are the first to stay
            if member.leaving and member.gone_by is None and self.n_workers < wanted:
                member.leaving = False
        self._grow(wanted - self.n_workers)
        staying = [member for member in self._members if member.stays]
        staying.sort(key=lambda m: (m.place is not None, m.ready, m not in self._idle, -m.index))
        for member in staying[: max(0, len(staying) - max(wanted, 0))]:
            member.leaving = True
            self._go_if_free(member)

    def _notice_draining(self) -> None:
        """Take workers off nodes that are about to go."""
        self._next_drain_look = time.monotonic() + _DRAIN_SECONDS
        if self._cluster.local:
            return
        self._draining = draining_nodes()
        for member in list(self._members):
            if member.place is None or member.place.node not in self._draining or member.gone_by is not None:
                continue
            member.gone_by = self._draining[member.place.node]
            left = "" if math.isinf(member.gone_by) else f" in {max(0.0, member.gone_by - time.time()):.0f} s"
            _logger.warning("%s gets no more to do: its node is drained and goes%s", member.name, left)
            if member in self._idle:
                self._idle.remove(member)
            self._go_if_free(member)

    def _release_from_quarantine(self, wanted: int) -> None:
        """Release those whose time is up, and the first of all where no other worker is ready."""
        held = sorted(
            (m for m in self._members if m.quarantine is not None and not m.going),
            key=lambda m: m.quarantine.until if m.quarantine else 0.0,
        )
        for member in held:
            assert member.quarantine is not None
            n_ready = sum(m.stays and m.ready for m in self._members)
            alone = n_ready == 0
            if not alone and time.monotonic() < member.quarantine.until:
                continue
            member.quarantine = None
            if n_ready >= wanted and not alone:
                _logger.warning("%s is let go from quarantine: others are in its place", member.name)
                self._let_go(member)
            else:
                why = "no other worker is ready" if alone else "its time is up"
                _logger.warning("%s is restarted and released from quarantine: %s", member.name, why)
                if all(entry[1] is not member for entry in self._recovering):
                    self._restart(member)
            if alone:
                return

    def _share_threads(self, n: int) -> None:
        """Divide this machine's processors among the ``n`` workers that are to be on it."""
        share = max(1, (os.cpu_count() or 1) // max(1, n))
        if self._divide_threads and share != self._threads:
            self._threads = share
            for member in self._members:
                if member.ready:
                    member.actor.set_threads.remote(share)

    def _grow(self, more: int) -> None:
        for _ in range(more):
            member = Member(self._next_index, self._new_actor())
            self._next_index += 1
            self._members.append(member)
            self._locate(member)

    def _go_if_free(self, member: Member) -> None:
        """Let a worker go unless it is at a call."""
        if not any(call.member is member and call.ticket >= 0 for call in self._calls.values()):
            self._let_go(member)

    def _let_go(self, member: Member) -> None:
        """End a worker that has no call of ours in flight."""
        ray.kill(member.actor, no_restart=True)
        self._members.remove(member)
        if member in self._idle:
            self._idle.remove(member)
        self._recovering = [entry for entry in self._recovering if entry[1] is not member]
        self._calls = {reference: call for reference, call in self._calls.items() if call.member is not member}

    def _give_up(self, member: Member) -> None:
        """Let a worker go that nothing can be done for; nobody takes its place for a while."""
        self._let_go(member)
        self._given_up.append(time.monotonic())

    def _restart(self, member: Member) -> None:
        """Replace the worker's process; what it is at is lost."""
        member.place, member.ready = None, False
        ray.kill(member.actor, no_restart=False)
        self._calls = {reference: call for reference, call in self._calls.items() if call.member is not member}
        if member in self._idle:
            self._idle.remove(member)
        self._recovering.append((time.monotonic() + 0.25, member))

    def _release(self, member: Member) -> None:
        """The worker's call has ended: it is idle, or goes."""
        if member.going:
            self._let_go(member)
        elif member.quarantine is None:
            self._idle.append(member)

    def _start(self, member: Member, ticket: int, method: str, args: tuple[Any, ...], seconds: float) -> None:
        reference = getattr(member.actor, method).remote(*args)
        self._calls[reference] = Call(member, ticket, time.monotonic() + seconds)

    def _locate(self, member: Member) -> None:
        """Ask where the worker is: it answers once it has a place, however long that takes."""
        member.place = None
        self._start(member, PLACE, "place", (), math.inf)

    def _end(self, call: Call, **how: Any) -> None:
        self._ready.append(Outcome(call.ticket, call.member.name, index=call.member.index, **how))

    def _settle(self, reference: Any, call: Call) -> None:
        member = call.member
        try:
            value = ray.get(reference, timeout=60)
        except RayTaskError as error:
            self._raised(call, error.cause if isinstance(error.cause, BaseException) else error)
            return
        except (RuntimeEnvSetupError, ActorUnschedulableError) as error:
            raise ResourceError(f"ray: {member.name} cannot be started: {error}") from error
        except RayError as error:  # the process, its node or its results are gone
            self._lost(call, error)
            return
        if call.ticket == PLACE:
            member.place = value
            if value.node in self._draining:
                self._let_go(member)  # it got there just before; another one is started elsewhere
            else:
                self._start(member, PREPARE, "prepare", (), _PREPARE_SECONDS)
            return
        if call.ticket == PREPARE:
            _require_same_version(value)
            member.info, member.ready, member.failures, member.restarting_since = value, True, 0, None
            if self._divide_threads:
                member.actor.set_threads.remote(self._threads)
        else:
            self._end(call, value=value)
        self._release(member)

    def _raised(self, call: Call, cause: BaseException) -> None:
        """The call's own code raised ``cause``; the process lives."""
        member = call.member
        if isinstance(cause, DeviceLostError):
            ray.kill(member.actor, no_restart=False)
            self._lost(call, cause)
        elif call.ticket >= 0:
            self._release(member)
            self._end(call, error=cause)
        elif isinstance(cause, TransientError):
            self._lost(call, cause)
        elif any(other.info is not None for other in self._members if other is not member):
            # Others have loaded the same model: it is this node that lacks something.
            _logger.warning("%s cannot load the model and is let go: %s", member.name, cause)
            self._give_up(member)
        else:
            raise cause

    def _lost(self, call: Call, error: BaseException) -> None:
        """The worker's process is gone, or is no longer waited for."""
        member = call.member
        member.place, member.ready = None, False
        if call.ticket >= 0:
            taken_away = member.gone_by is not None or bool(getattr(error, "preempted", False))
            self._end(call, error=error, lost=True, blameless=taken_away)
        self._last_loss = f"{type(error).__name__}: {error}"
        if call.ticket < 0 and isinstance(error, ActorUnavailableError) and not member.going:
            # Still restarting: its node is busy, or there is none for it yet. That is no failure of its own.
            now = time.monotonic()
            member.restarting_since = member.restarting_since or now
            if now - member.restarting_since < _PREPARE_SECONDS:
                self._recovering.append((now + 1.0, member))
                return
        member.failures += 1
        if member.going:
            self._let_go(member)
        elif member.failures > _RECOVERIES:
            self._give_up(member)
        else:
            self._recovering.append((time.monotonic() + min(0.25 * 2.0**member.failures, 10.0), member))

    def _recover(self) -> None:
        now = time.monotonic()
        due = [member for at, member in self._recovering if at <= now]
        self._recovering = [entry for entry in self._recovering if entry[0] > now]
        for member in due:
            self._locate(member)

    def _expire(self) -> None:
        now = time.monotonic()
        for reference, call in list(self._calls.items()):
            if reference not in self._calls:
                continue  # went with its worker
            if call.member.out_of_time and call.ticket >= 0:
                del self._calls[reference]
                self._lost(call, TimeoutError(f"the node of {call.member.name} was to go by now"))
            elif now > call.deadline:
                del self._calls[reference]
                ray.kill(call.member.actor, no_restart=False)
                self._lost(call, TimeoutError(f"no answer from {call.member.name} before the deadline"))


def _as_range(n_workers: WorkerRange | int) -> WorkerRange:
    return n_workers if isinstance(n_workers, WorkerRange) else WorkerRange(n_workers, n_workers)


def _require_same_version(info: WorkerInfo) -> None:
    """Raise a ResourceError for a worker that runs another version of was-search than this process."""
    if info.version != __version__:
        raise ResourceError(
            f"ray: the worker {info.name} runs was-search {info.version} and the coordinator {__version__}; install "
            "the same version on every node, or none: the coordinator ships its own packages"
        )
