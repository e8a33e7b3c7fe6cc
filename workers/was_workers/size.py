"""How many workers a pool has: within the range asked for, as many as are useful, none on nodes that go."""

from __future__ import annotations

import logging
import math
import os
import time

from was_search.errors import ResourceError
from was_search.studies.pool_state import PoolState
from was_search.studies.worker_range import WorkerRange
from was_workers.cluster import Cluster
from was_workers.draining import draining_nodes
from was_workers.members import Members

_LOOK_SECONDS = 0.5
"""Time between two looks at the pool's own size."""

_DRAIN_SECONDS = 2.0
"""Time between two looks for nodes that are about to go."""

_logger = logging.getLogger(__name__)


class Size:
    """Starts workers and lets them go until there are as many as are wanted.

    Args:
        members: the workers.
        cluster: where they are.
        asked: how many there may be, as :func:`fitting` gives it.
        useful: at most this many workers have something to do.
    """

    def __init__(self, members: Members, cluster: Cluster, asked: WorkerRange, useful: float) -> None:
        self._members = members
        self._cluster = cluster
        self.asked = asked
        self.useful = useful
        self._next_look = self._next_drain_look = 0.0
        self._draining: dict[str, float] = {}

    @property
    def n_workers(self) -> int:
        return len(self._members.staying)

    @property
    def wanted(self) -> int:
        return self.asked.clamp(int(min(self.useful, self.asked.most))) - self._members.n_given_up

    @property
    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() >= self._next_look

    @property
    def state(self) -> PoolState:
        """How many workers are doing what."""
        members, stay = self._members.all, self._members.staying
        ready = sum(member.ready for member in stay)
        pending = sum(member.place is None for member in stay)
        return PoolState(
            asked=str(self.asked),
            ready=ready,
            loading=len(stay) - ready - pending,
            pending=pending,
            draining=sum(member.going for member in members),
            quarantined=tuple(shown for member in members if (shown := member.shown) is not None),
        )

    def goes(self, node: str) -> bool:
        """Whether the node of this id is about to be taken away, as far as is known."""
        return node in self._draining

    def look_soon(self) -> None:
        self._next_look = 0.0

    def keep(self) -> None:
        """Start and let go workers until there are as many as are wanted now."""
        now = time.monotonic()
        self._next_look = now + _LOOK_SECONDS
        if now >= self._next_drain_look:
            self._notice_draining()
        members, wanted = self._members, self.wanted
        members.end_quarantines(wanted)
        members.threads.divide(wanted + sum(member.quarantine is not None for member in members.all), members.all)
        for member in members.all:  # workers that were to go but have not gone yet are the first to stay
            if member.leaving and member.gone_by is None and self.n_workers < wanted:
                member.leaving = False
        for _ in range(wanted - self.n_workers):
            members.start()
        staying = sorted(members.staying, key=lambda m: (m.place is not None, m.ready, m not in members.idle, -m.index))
        for member in staying[: max(0, len(staying) - max(wanted, 0))]:
            member.leaving = True
            members.let_go_if_free(member)

    def _notice_draining(self) -> None:
        """Take workers off nodes that are about to go."""
        self._next_drain_look = time.monotonic() + _DRAIN_SECONDS
        if self._cluster.local:
            return
        self._draining = draining_nodes()
        for member in list(self._members.all):
            if member.place is None or member.place.node not in self._draining or member.gone_by is not None:
                continue
            member.gone_by = self._draining[member.place.node]
            left = "" if math.isinf(member.gone_by) else f" in {max(0.0, member.gone_by - time.time()):.0f} s"
            _logger.warning("%s gets no more to do: its node is drained and goes%s", member.name, left)
            self._members.let_go_if_free(member)


def fitting(asked: WorkerRange, cluster: Cluster, gpus_per_worker: float) -> WorkerRange:
    """``asked``, cut to what this machine has room for if the workers must be on it.

    Raises:
        ResourceError: there is no room for the least number.
    """
    if not cluster.local:
        return asked
    gpus = gpus_per_worker
    if asked.least * gpus > cluster.gpus + 1e-9:
        raise ResourceError(
            f"{asked.least} worker(s) with {gpus:g} GPU each were asked for and this machine has "
            f"{cluster.gpus:g}; lower --workers or --gpus-per-worker, or use --device cpu"
        )
    room = int((cluster.gpus + 1e-9) / gpus) if gpus else (os.cpu_count() or 1)
    return WorkerRange(asked.least, max(asked.least, min(asked.most, room)))
