"""The pool's workers and their life: started, placed, ready, lost and found again, in quarantine, let go."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from was_search import __version__
from was_search.coordinator.contracts import Outcome
from was_search.errors import DeviceLostError, ResourceError, TransientError
from was_workers.calls_in_flight import PLACE, PREPARE, CallEnd, CallInFlight, CallsInFlight
from was_workers.deaths import Death, death_of
from was_workers.member import Member, Quarantine
from was_workers.threads import ThreadShare
from was_workers.worker import WorkerInfo

PREPARE_SECONDS = 3600.0
"""Time for a worker to load its model; a hub id may have to be downloaded."""

_RECOVERIES = 8
"""Failures in a row to become ready before a worker is given up that has been ready before."""

_STARTS = 4
"""Failures in a row before one is given up that never was ready."""

_STARTS_SECONDS = 45.0
"""Time after which two failures are enough for that: a large model may die late in its load."""

_GIVEN_UP_SECONDS = 600.0
"""Time after which the place of a worker that was given up is tried again."""

_logger = logging.getLogger(__name__)


class Members:
    """All workers, and what happens to them; :class:`was_workers.size.Size` decides how many there are.

    Args:
        calls: those in flight.
        new_actor: makes the actor of a worker, by its number.
        threads: CPU threads of each worker.
        goes: whether the node of this id is about to be taken away.

    Attributes:
        all: in the order of their start.
        idle: the ready ones without a call, the next to get one first.
        outcomes: of calls that have ended and were not handed over yet.
        last_loss: why the last process or call was lost.
        n_failures: processes and loads that failed before their worker was ready.
        were_ready: whether any worker ever was ready.
    """

    def __init__(
        self,
        calls: CallsInFlight,
        new_actor: Callable[[int], Any],
        *,
        threads: ThreadShare,
        goes: Callable[[str], bool],
    ) -> None:
        self._calls = calls
        self._new_actor = new_actor
        self._goes = goes
        self.threads = threads
        self.all: list[Member] = []
        self.idle: deque[Member] = deque()
        self.outcomes: list[Outcome] = []
        self.last_loss = ""
        self.n_failures = 0
        self.were_ready = False
        self._next_index = 0
        self._recovering: list[tuple[float, Member]] = []
        self._given_up: list[float] = []

    @property
    def staying(self) -> list[Member]:
        return [member for member in self.all if member.stays]

    @property
    def n_ready(self) -> int:
        return sum(member.ready for member in self.staying)

    @property
    def n_given_up(self) -> int:
        """Places of workers that were given up not long ago."""
        now = time.monotonic()
        self._given_up = [at for at in self._given_up if now - at < _GIVEN_UP_SECONDS]
        return len(self._given_up)

    @property
    def all_lost(self) -> str:
        """What to say where no worker is left."""
        what = "every worker was lost and could not be restarted" if self.were_ready else "no worker could be started"
        return f"{what}: {self.n_failures} process(es) failed before they were ready; the last: {self.last_loss}"

    @property
    def waiting_seconds(self) -> float:
        """How long the worker that has waited the longest waits for a place; 0 where none does."""
        waiting = (c.seconds for c in self._calls.placing if c.member.stays and c.member.unreachable_since is None)
        return max(waiting, default=0.0)

    def forgive(self) -> None:
        """Try the places of workers that were given up again."""
        self._given_up.clear()

    def close(self, *, kill: bool = True) -> None:
        """Kill the actors, unless their Ray is gone; calls in flight are lost."""
        for member in self.all if kill else ():
            _end_process(member)
        self.all.clear()
        self.idle.clear()
        self._calls.clear()

    def start(self) -> None:
        """Start one more worker."""
        member = Member(self._next_index)
        self._next_index += 1
        self.all.append(member)
        self._locate(member)

    def let_go(self, member: Member) -> None:
        """End a worker; its call in flight is dropped."""
        _end_process(member)
        self.all.remove(member)
        self._take_off(member)
        self._recovering = [entry for entry in self._recovering if entry[1] is not member]
        self._calls.drop_all_of(member)

    def let_go_if_free(self, member: Member) -> None:
        """Let a worker go, now if it is idle, else when its call ends."""
        self._take_off(member)
        if not self._calls.busy(member):
            self.let_go(member)

    def restart(self, member: Member) -> None:
        """Replace the worker's process; its call in flight is dropped."""
        member.place, member.ready = None, False
        _end_process(member)
        self._calls.drop_all_of(member)
        self._take_off(member)
        self._recovering.append((time.monotonic() + 0.25, member))

    def lose_all(self, reason: str) -> None:
        """Forget all processes, which went together; calls in flight come back as lost, and count against nobody.

        Workers get new processes at the next :meth:`turn`.
        """
        for call in self._calls.running:
            self._end(call, error=TransientError(reason), lost=True, blameless=True)
        self._calls.clear()
        self.idle.clear()
        self.all = [member for member in self.all if not member.going]
        for member in self.all:
            member.actor = member.place = member.unreachable_since = None
            member.ready = False
        self._recovering = [(time.monotonic(), member) for member in self.all]

    def quarantine(self, member: Member, reason: str, seconds: float) -> None:
        """Give a worker nothing for ``seconds``; its call in flight comes back as lost, and counts against nobody."""
        member.quarantine = Quarantine(reason, time.monotonic() + seconds, datetime.now(UTC))
        self._take_off(member)
        for call in self._calls.running:
            if call.member is member:
                self._calls.drop(call)
                error = TransientError(f"taken off {member.name}, which is in quarantine: {reason}")
                self._end(call, error=error, lost=True, blameless=True)
        _logger.warning("%s is in quarantine for %.0f s: %s", member.name, seconds, reason)

    def end_quarantines(self, wanted: int) -> None:
        """Release workers whose quarantine is over, and the first of all where no other worker is ready.

        A released worker is let go where ``wanted`` others are ready, else it is restarted.
        """
        held = [(m.quarantine.until, m) for m in self.all if m.quarantine is not None and not m.going]
        for until, member in sorted(held, key=lambda entry: entry[0]):
            n_ready = self.n_ready
            alone = n_ready == 0
            if not alone and time.monotonic() < until:
                continue
            member.quarantine = None
            if n_ready >= wanted and not alone:
                _logger.warning("%s is let go from quarantine: others are in its place", member.name)
                self.let_go(member)
            else:
                why = "no other worker is ready" if alone else "its time is up"
                _logger.warning("%s is restarted and released from quarantine: %s", member.name, why)
                if all(entry[1] is not member for entry in self._recovering):
                    self.restart(member)
            if alone:
                return

    def settle(self, ending: CallEnd) -> None:
        """Take in how a call has ended, and go on with its worker.

        Raises:
            WasError: it cannot load its model, no other has, and none is trying.
            ResourceError: it runs another version of was-search, or its code cannot be imported and no other's could.
        """
        call, member = ending.call, ending.call.member
        if ending.gone is not None and call.ours and (death := death_of(ending.gone)).again:
            _end_process(member)
            self._cannot_start(member, ResourceError(f"ray: {member.name} cannot be started: {death.words}"))
        elif ending.gone is not None:
            self._lost(call, ending.gone)
        elif ending.raised is not None:
            self._raised(call, ending.raised)
        elif call.ticket == PLACE:
            member.place = ending.value
            if self._goes(ending.value.node):
                self.let_go(member)  # it got there just before; another one is started elsewhere
            else:
                self._calls.start(member, PREPARE, member.actor.prepare.remote(), PREPARE_SECONDS)
        elif call.ticket == PREPARE:
            _require_same_version(ending.value)
            member.info, member.ready, member.failures, member.unreachable_since = ending.value, True, 0, None
            self.were_ready = True
            self.threads.tell(member)
            self._release(member)
        else:
            self._end(call, value=ending.value)
            self._release(member)

    def turn(self) -> None:
        """End overdue calls, and look for lost workers that may be back."""
        for call in self._calls.overdue():
            if not self._calls.drop(call):
                continue  # went with its worker
            if call.member.out_of_time and not call.ours:
                self._lost(call, TimeoutError(f"the node of {call.member.name} was to go by now"))
            else:
                self._hung(call, f"no answer from {call.member.name} before the deadline")
        now = time.monotonic()
        due = [member for at, member in self._recovering if at <= now]
        self._recovering = [entry for entry in self._recovering if entry[0] > now]
        for member in due:
            self._locate(member)

    def give_up(self, ticket: int, reason: str) -> None:
        """Count a call as lost if it is still in flight; its worker's process, which may hang, is replaced."""
        for call in self._calls.running:
            if call.ticket == ticket and self._calls.drop(call):
                _logger.warning("%s is restarted: %s", call.member.name, reason)
                self._hung(call, f"no answer from {call.member.name}, {reason}")

    def _hung(self, call: CallInFlight, words: str) -> None:
        self._lost(call, TimeoutError(words))

    def _raised(self, call: CallInFlight, cause: BaseException) -> None:
        """Go on after a call whose own code raised ``cause``; the process lives."""
        if isinstance(cause, DeviceLostError) or (call.ours and isinstance(cause, TransientError)):
            self._lost(call, cause)
        elif call.ours:
            self._cannot_start(call.member, cause)
        else:
            self._release(call.member)
            self._end(call, error=cause)

    def _cannot_start(self, member: Member, cause: BaseException) -> None:
        """Let go of a worker that would fail again; where no other may do better, that is the end."""
        if not any(other.info is not None or other.place is not None for other in self.all if other is not member):
            raise cause
        # Others have loaded the same model, or may yet: then it is this node that lacks something.
        _logger.warning("%s cannot load the model and is let go: %s", member.name, cause)
        self._give_up(member)

    def _lost(self, call: CallInFlight, error: BaseException) -> None:
        """Go on after a call whose worker's process is gone, or is no longer waited for."""
        member, death = call.member, death_of(error)
        was_ready, member.place, member.ready = member.ready, None, False
        if not call.ours:
            taken_away = member.gone_by is not None or bool(getattr(error, "preempted", False))
            self._end(call, error=error, lost=True, blameless=taken_away)
        self.last_loss = death.words
        if not isinstance(error, ActorUnavailableError):
            _end_process(member)
        elif call.ours and not member.going:
            # It cannot be reached, and Ray does not know yet whether it lives. That is no failure of its own.
            now = time.monotonic()
            member.unreachable_since = member.unreachable_since or now
            if now - member.unreachable_since < PREPARE_SECONDS:
                self._recovering.append((now + 1.0, member))
                return
        if member.going:
            self.let_go(member)
            return
        member.failures += 1
        if not was_ready:
            self.n_failures += 1
            _logger.warning(
                "%s failed before it was ready, %d time(s) in a row: %s", member.name, member.failures, death.reason
            )
        if _hopeless(member, death):
            _logger.warning("%s is given up for %.0f s: %s", member.name, _GIVEN_UP_SECONDS, death.words)
            self._give_up(member)
        else:
            self._recovering.append((time.monotonic() + min(0.125 * 2.0**member.failures, 10.0), member))

    def _give_up(self, member: Member) -> None:
        """Let go of a worker that cannot be helped; nobody takes its place for a while."""
        self.let_go(member)
        self._given_up.append(time.monotonic())

    def _locate(self, member: Member) -> None:
        """Ask where the worker is, which gets a process if it has none: it answers once it has a place."""
        member.place = None
        if member.actor is None:
            member.actor = self._new_actor(member.index)
        self._calls.start(member, PLACE, member.actor.place.remote(), math.inf)

    def _release(self, member: Member) -> None:
        """Make a worker idle whose call has ended, or let it go."""
        if member.going:
            self.let_go(member)
        elif member.quarantine is None:
            self.idle.append(member)

    def _take_off(self, member: Member) -> None:
        if member in self.idle:
            self.idle.remove(member)

    def _end(self, call: CallInFlight, **how: Any) -> None:
        self.outcomes.append(
            Outcome(call.ticket, call.member.name, index=call.member.index, seconds=call.seconds, **how)
        )


def _hopeless(member: Member, death: Death) -> bool:
    """Whether a worker has failed so often that another process would too."""
    if member.info is not None or death.node_gone:
        return member.failures > _RECOVERIES
    long = time.monotonic() - member.began > _STARTS_SECONDS
    return member.failures >= (2 if long else _STARTS)


def _end_process(member: Member) -> None:
    if member.actor is not None:
        ray.kill(member.actor, no_restart=True)
        member.actor = None


def _require_same_version(info: WorkerInfo) -> None:
    """Raise a ResourceError for a worker that runs another version of was-search than this process."""
    if info.version != __version__:
        raise ResourceError(
            f"ray: the worker {info.name} runs was-search {info.version} and the coordinator {__version__}; install "
            "the same version on every node, or none: the coordinator ships its own packages"
        )
