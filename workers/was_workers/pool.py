"""The pool: Ray actors that each hold a model, and calls that survive the loss of one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayError, RayTaskError, RuntimeEnvSetupError

from was_search import __version__
from was_search.errors import DeviceLostError, ResourceError, TransientError
from was_workers.cluster import Cluster
from was_workers.worker import Worker, WorkerInfo, WorkerSpec

_logger = logging.getLogger(__name__)

_RECOVERIES = 8
"""Failures in a row to become ready before a worker is given up."""

_PREPARE_SECONDS = 3600.0
"""For a worker to start and load its model; a hub id may have to be downloaded."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended. ``lost`` says that the worker died or missed its deadline: the call may be repeated."""

    ticket: int
    worker: str
    value: Any = None
    error: BaseException | None = None
    lost: bool = False


@dataclass(eq=False)
class _Member:
    index: int
    actor: Any
    info: WorkerInfo | None = None
    failures: int = 0
    restarting_since: float | None = None
    leaving: bool = False  # once its call has ended

    @property
    def name(self) -> str:
        return f"worker-{self.index}" + (f"@{self.info.name}" if self.info else "")


@dataclass
class _Call:
    member: _Member
    ticket: int  # -1: the call that makes a worker ready
    deadline: float


class Pool:
    """Actors, one call at a time on each; :meth:`resize` changes their number. Used by one thread; closes with its
    context.

    ``submit`` needs an idle worker, ``wait`` returns what has ended. Actors restart by themselves
    (``max_restarts=-1``); a worker that was lost becomes idle again once it has loaded its model. Calls are never
    repeated by Ray (``max_task_retries=0``): the caller decides.

    Args:
        cluster: from ``connect``.
        spec: what the workers load.
        n_workers: how many.
        gpus_per_worker: GPUs of each; fractions share a GPU.
    """

    def __init__(self, cluster: Cluster, spec: WorkerSpec, *, n_workers: int, gpus_per_worker: float) -> None:
        self._cluster = cluster
        self._gpus_per_worker = gpus_per_worker
        self._require_room(n_workers)
        # A local Ray is ours alone and counts the processors it was started with: it must not keep a worker waiting.
        actor_class = ray.remote(Worker).options(
            num_cpus=0 if cluster.local else 1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=0
        )
        self._new_actor: Callable[[], Any] = lambda: actor_class.remote(spec)
        self._members: list[_Member] = []
        self._next_index = 0
        self._idle: deque[_Member] = deque()
        self._calls: dict[Any, _Call] = {}
        self._next_ticket = 0
        self._ready: list[Outcome] = []
        self._recovering: list[tuple[float, _Member]] = []
        self._last_loss = ""
        self._grow(n_workers)

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

    def resize(self, n_workers: int) -> None:
        """Start workers, or let some go, until there are ``n_workers``; returns at once and loses no call.

        Idle ones go first, then those that have not loaded their model, then busy ones, each once its call has
        ended.

        Raises:
            ResourceError: a local machine lacks the GPUs for so many; nothing is changed.
        """
        if n_workers < 1:
            raise ResourceError(f"workers: must be at least 1, got {n_workers}")
        self._require_room(n_workers)
        for member in self._members:  # those that have not gone yet are the first to stay
            if member.leaving and self.n_workers < n_workers:
                member.leaving = False
        self._grow(n_workers - self.n_workers)
        staying = [member for member in self._members if not member.leaving]
        staying.sort(key=lambda m: (m not in self._idle, m.info is not None, -m.index))
        for member in staying[: len(staying) - n_workers]:
            member.leaving = True
            if not any(call.member is member and call.ticket >= 0 for call in self._calls.values()):
                self._let_go(member)

    def abandon(self) -> None:
        """Kill every call in flight; its ticket never comes back. The workers load their model again."""
        for reference, call in list(self._calls.items()):
            if call.ticket < 0:
                continue
            del self._calls[reference]
            if call.member.leaving:
                self._let_go(call.member)
            else:
                ray.kill(call.member.actor, no_restart=False)
                self._recovering.append((time.monotonic() + 0.25, call.member))
        self._ready.clear()

    @property
    def n_workers(self) -> int:
        """Workers there are, loaded or not; those that are about to go left out."""
        return sum(not member.leaving for member in self._members)

    @property
    def n_loaded(self) -> int:
        """Workers that hold the model, those that are about to go included."""
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
                self._settle(reference, self._calls.pop(reference))
        else:
            time.sleep(min(timeout_seconds, 0.25))
        self._expire()
        self._recover()
        if not self._members:
            raise ResourceError(f"every worker was lost and could not be restarted; the last error: {self._last_loss}")
        outcomes, self._ready = self._ready, []
        return outcomes

    def wait_idle(self, timeout_seconds: float = _PREPARE_SECONDS) -> None:
        """Block until a worker is idle.

        Raises:
            ResourceError: none became ready in time.
        """
        end = time.monotonic() + timeout_seconds
        while not self._idle:
            if time.monotonic() > end:
                raise ResourceError(
                    f"no worker had loaded its model within {timeout_seconds:.0f} s; are there enough free resources?"
                )
            self._ready = self.wait(1.0)

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

    def _require_room(self, n_workers: int) -> None:
        needed = n_workers * self._gpus_per_worker
        if self._cluster.local and needed > self._cluster.gpus + 1e-9:
            raise ResourceError(
                f"{n_workers} worker(s) with {self._gpus_per_worker:g} GPU each were asked for and this machine has "
                f"{self._cluster.gpus:g}; lower --workers or --gpus-per-worker, or use --device cpu"
            )

    def _grow(self, more: int) -> None:
        for _ in range(more):
            member = _Member(self._next_index, self._new_actor())
            self._next_index += 1
            self._members.append(member)
            self._prepare(member)

    def _let_go(self, member: _Member) -> None:
        """End a worker that has no call of ours in flight."""
        ray.kill(member.actor, no_restart=True)
        self._members.remove(member)
        if member in self._idle:
            self._idle.remove(member)
        self._recovering = [entry for entry in self._recovering if entry[1] is not member]
        self._calls = {reference: call for reference, call in self._calls.items() if call.member is not member}

    def _release(self, member: _Member) -> None:
        """The worker's call has ended: it is idle, or goes."""
        if member.leaving:
            self._let_go(member)
        else:
            self._idle.append(member)

    def _start(self, member: _Member, ticket: int, method: str, args: tuple[Any, ...], seconds: float) -> None:
        reference = getattr(member.actor, method).remote(*args)
        self._calls[reference] = _Call(member, ticket, time.monotonic() + seconds)

    def _prepare(self, member: _Member) -> None:
        self._start(member, -1, "prepare", (), _PREPARE_SECONDS)

    def _settle(self, reference: Any, call: _Call) -> None:
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
        if call.ticket < 0:
            _require_same_version(value)
            member.info, member.failures, member.restarting_since = value, 0, None
        else:
            self._ready.append(Outcome(call.ticket, member.name, value=value))
        self._release(member)

    def _raised(self, call: _Call, cause: BaseException) -> None:
        """The call's own code raised ``cause``; the process lives."""
        member = call.member
        if isinstance(cause, DeviceLostError):
            ray.kill(member.actor, no_restart=False)
            self._lost(call, cause)
        elif call.ticket >= 0:
            self._release(member)
            self._ready.append(Outcome(call.ticket, member.name, error=cause))
        elif isinstance(cause, TransientError):
            self._lost(call, cause)
        elif any(other.info is not None for other in self._members if other is not member):
            # Others have loaded the same model: it is this node that lacks something.
            _logger.warning("%s cannot load the model and is let go: %s", member.name, cause)
            self._let_go(member)
        else:
            raise cause

    def _lost(self, call: _Call, error: BaseException) -> None:
        member = call.member
        if call.ticket >= 0:
            self._ready.append(Outcome(call.ticket, member.name, error=error, lost=True))
        self._last_loss = f"{type(error).__name__}: {error}"
        if call.ticket < 0 and isinstance(error, ActorUnavailableError) and not member.leaving:
            # Still restarting: its node is busy, or there is none for it yet. That is no failure of its own.
            now = time.monotonic()
            member.restarting_since = member.restarting_since or now
            if now - member.restarting_since < _PREPARE_SECONDS:
                self._recovering.append((now + 1.0, member))
                return
        member.failures += 1
        if member.leaving or member.failures > _RECOVERIES:
            self._let_go(member)
            return
        self._recovering.append((time.monotonic() + min(0.25 * 2.0**member.failures, 10.0), member))

    def _recover(self) -> None:
        now = time.monotonic()
        due = [member for at, member in self._recovering if at <= now]
        self._recovering = [entry for entry in self._recovering if entry[0] > now]
        for member in due:
            self._prepare(member)

    def _expire(self) -> None:
        now = time.monotonic()
        for reference, call in list(self._calls.items()):
            if now > call.deadline:
                del self._calls[reference]
                ray.kill(call.member.actor, no_restart=False)
                self._lost(call, TimeoutError(f"no answer from {call.member.name} before the deadline"))


def _require_same_version(info: WorkerInfo) -> None:
    """Raise a ResourceError for a worker that runs another version of was-search than this process."""
    if info.version != __version__:
        raise ResourceError(
            f"ray: the worker {info.name} runs was-search {info.version} and the coordinator {__version__}; install "
            "the same version on every node, or none: the coordinator ships its own packages"
        )
