"""Calls in flight: one Ray reference each, and how a call ended."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RayTaskError, RuntimeEnvSetupError

from was_search.errors import ResourceError
from was_workers.member import Member

PLACE, PREPARE = -2, -1
"""Tickets of the calls that tell where a worker is, and that make it load its model."""


@dataclass(frozen=True, eq=False)
class CallInFlight:
    """A call in flight: its worker, its ticket, and the monotonic seconds of its deadline and of its start."""

    member: Member
    ticket: int
    deadline: float = math.inf
    reference: Any = None
    started: float = field(default_factory=time.monotonic)

    @property
    def ours(self) -> bool:
        """Whether the call is the pool's own and not one of its user."""
        return self.ticket < 0

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class CallEnd:
    """What became of a call: it returned ``value``, its code ``raised``, or it is ``gone`` with its process."""

    call: CallInFlight
    value: Any = None
    raised: BaseException | None = None
    gone: BaseException | None = None


class CallsInFlight:
    """The calls in flight. A call that was dropped never ends: whatever its worker answers is ignored."""

    def __init__(self) -> None:
        self._by_reference: dict[Any, CallInFlight] = {}

    def start(self, member: Member, ticket: int, reference: Any, seconds: float) -> None:
        """Follow a call by Ray's ``reference``; ``member`` must end it within ``seconds``."""
        self._by_reference[reference] = CallInFlight(member, ticket, time.monotonic() + seconds, reference)

    @property
    def running(self) -> list[CallInFlight]:
        """The calls of the pool's user, in the order of their start."""
        return [call for call in self._by_reference.values() if not call.ours]

    @property
    def placing(self) -> list[CallInFlight]:
        """The calls of workers that wait for a place."""
        return [call for call in self._by_reference.values() if call.ticket == PLACE]

    def busy(self, member: Member) -> bool:
        """Whether the worker is at a call of the pool's user."""
        return any(call.member is member for call in self.running)

    def overdue(self) -> list[CallInFlight]:
        """Calls whose deadline has passed, and those of the pool's user whose node was to be gone by now."""
        now = time.monotonic()
        calls = self._by_reference.values()
        return [call for call in calls if now > call.deadline or (not call.ours and call.member.out_of_time)]

    def drop(self, call: CallInFlight) -> bool:
        """Forget a call; False where it is not there any more."""
        return self._by_reference.pop(call.reference, None) is not None

    def drop_all_of(self, member: Member) -> None:
        self._by_reference = {r: call for r, call in self._by_reference.items() if call.member is not member}

    def clear(self) -> None:
        self._by_reference.clear()

    def wait(self, timeout_seconds: float) -> list[CallInFlight]:
        """All calls that have ended, as soon as there is one; [] after ``timeout_seconds``.

        They stay until :meth:`take` takes them out, or until handling another one has dropped them.
        """
        if not self._by_reference:
            time.sleep(min(timeout_seconds, 0.25))
            return []
        ready, _ = ray.wait(list(self._by_reference), num_returns=1, timeout=timeout_seconds)
        if ready:  # take all that are there, without waiting
            ready, _ = ray.wait(list(self._by_reference), num_returns=len(self._by_reference), timeout=0)
        return [self._by_reference[reference] for reference in ready]

    def take(self, call: CallInFlight) -> CallEnd | None:
        """How a call of :meth:`wait` ended; None where it has been dropped since.

        Raises:
            ResourceError: its worker cannot be started at all.
        """
        if not self.drop(call):
            return None
        try:
            return CallEnd(call, value=ray.get(call.reference, timeout=60))
        except RayTaskError as error:
            return CallEnd(call, raised=error.cause if isinstance(error.cause, BaseException) else error)
        except (RuntimeEnvSetupError, ActorUnschedulableError) as error:
            raise ResourceError(f"ray: {call.member.name} cannot be started: {error}") from error
        except RayError as error:  # the process, its node or its results are gone
            return CallEnd(call, gone=error)
