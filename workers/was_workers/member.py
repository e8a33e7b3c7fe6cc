"""What the pool knows of one of its workers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from was_search.studies.pool_state import Quarantined
from was_workers.worker import Place, WorkerInfo


@dataclass
class Quarantine:
    """Why a worker is given nothing, since when, and until which monotonic second."""

    reason: str
    until: float
    since: datetime


@dataclass(eq=False)
class Member:
    """A worker, from its actor's creation to its end.

    Attributes:
        index: its number in the pool.
        actor: Ray's handle of its process; None between one process and the next.
        place: where its process is; None while it waits for a place.
        info: what it said when it had last loaded its model; None before.
        ready: its process holds the model.
        failures: failed attempts to become ready, in a row.
        began: when its first process was asked for, by the monotonic clock.
        unreachable_since: when Ray first said that its process cannot be reached, by the monotonic clock.
        leaving: it goes once its call has ended.
        gone_by: when its node, which is being drained, goes away: seconds since the epoch, ``inf`` if that is open;
            None where the node stays.
        quarantine: None where it is well.
    """

    index: int
    actor: Any = None
    place: Place | None = None
    info: WorkerInfo | None = None
    ready: bool = False
    failures: int = 0
    began: float = field(default_factory=time.monotonic)
    unreachable_since: float | None = None
    leaving: bool = False
    gone_by: float | None = None
    quarantine: Quarantine | None = None

    @property
    def name(self) -> str:
        return f"worker-{self.index}" + (f"@{self.info.name}" if self.info else "")

    @property
    def going(self) -> bool:
        """Whether the worker only ends its call and then goes."""
        return self.leaving or self.gone_by is not None

    @property
    def stays(self) -> bool:
        """Whether the worker counts towards the size that was asked for."""
        return not self.going and self.quarantine is None

    @property
    def out_of_time(self) -> bool:
        return self.gone_by is not None and time.time() > self.gone_by

    @property
    def shown(self) -> Quarantined | None:
        """The worker's quarantine as status shows it; None where it is well, or goes."""
        if (held := self.quarantine) is None or self.going:
            return None
        return Quarantined(self.name, held.reason, held.since.isoformat(timespec="seconds"))
