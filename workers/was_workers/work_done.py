"""What a pool's workers have done so far: their calls, the time these took, and what went through Ray's memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from was_workers.calls_in_flight import CallEnd

_MOST_WITH_A_REPLY = 100 * 1024
"""Bytes of a result from which on Ray keeps it in its object store, by default."""


@dataclass
class WorkDone:
    """Sums over the calls of a pool's user, each from its start until its end was seen.

    Attributes:
        calls: those that have returned something.
        busy_seconds: time of workers at calls, lost and failed ones included.
        stored_bytes: sizes of shared values and of results in Ray's object store; arguments that calls carry
            themselves, and results so small that they travel with the reply, do not count.
    """

    calls: int = 0
    busy_seconds: float = 0.0
    stored_bytes: int = 0

    def shared(self, reference: Any) -> None:
        """Count a value that was put into the object store."""
        self.stored_bytes += _stored_bytes(reference)

    def ended(self, end: CallEnd) -> None:
        """Count a call that has ended."""
        if end.call.ours:
            return
        self.busy_seconds += end.call.seconds
        if end.raised is None and end.gone is None:
            self.calls += 1
            self.stored_bytes += _stored_bytes(end.call.reference)


def _stored_bytes(reference: Any) -> int:
    """Size of an object of our own in the object store, as this process knows it; 0 where it came with a reply."""
    from ray.exceptions import RayError
    from ray.experimental import get_object_locations

    with suppress(RayError):  # a figure less is no reason to end a search
        found = get_object_locations([reference], timeout_ms=1000).get(reference, {})
        size = int(found.get("object_size") or 0)
        # for some microseconds after a result's coming, the node that holds it is not known yet
        return size if found.get("node_ids") or size > _MOST_WITH_A_REPLY else 0
    return 0
