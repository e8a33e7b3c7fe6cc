"""Where a cluster has no room for the workers: said within seconds, again while it lasts, and ended if it must last."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from was_search.errors import ResourceError
from was_search.studies.worker_range import WorkerRange
from was_workers.autoscaler import may_grow

_NEVER_SECONDS = 4.0
"""Time for a place after which a lack of it is said where the nodes are too few or too small."""

_TAKEN_SECONDS = 15.0
"""The same where they are large enough: a process may also be slow to start."""

_AGAIN_SECONDS = 30.0
"""Time between two lines on the same lack of room."""

_HOPELESS_SECONDS = 45.0
"""Time without a new node after which a start on too few of them ends."""

_logger = logging.getLogger(__name__)

Sizes = Sequence[tuple[float, float]]
"""CPUs and GPUs of every node that lives."""


def node_sizes() -> Sizes:
    """What the cluster's nodes have, whoever uses it."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return sorted((float(found.get("CPU", 0)), float(found.get("GPU", 0))) for found in nodes)


def capacity(sizes: Sizes, gpus_per_worker: float) -> int:
    """How many workers the nodes hold if nothing else runs there."""
    return sum(min(int(cpus), _on_gpus(gpus, gpus_per_worker)) for cpus, gpus in sizes)


def _on_gpus(gpus: float, each: float) -> int:
    if not each:
        return 10**9
    if each < 1.0:
        return int(gpus) * int(1.0 / each + 1e-9)  # a share lies on one GPU
    return int((gpus + 1e-9) / each)


class RoomWatch:
    """Looks whether workers find places on a cluster.

    Args:
        gpus_per_worker: GPUs that each worker needs, beside one CPU.
        clock: seconds.
    """

    def __init__(self, gpus_per_worker: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._gpus = gpus_per_worker
        self._clock = clock
        self._said_at: float | None = None
        self._said_few = False
        self._sizes: Sizes = ()
        self._grown_at = 0.0

    def look(self, asked: WorkerRange, placed: int, waiting_seconds: float, *, starting: bool = False) -> None:
        """Say that workers wait for places, as often as it is due.

        Args:
            asked: how many workers there are to be.
            placed: those that have a place.
            waiting_seconds: how long the one that has waited the longest waits for its place.
            starting: the run has not begun yet, and does not before ``asked.least`` of a range, or one worker of a
                fixed number, are there.

        Raises:
            ResourceError: it is starting, the cluster cannot hold as many, nothing adds nodes, and no node has come for
                a while.
        """
        needed = asked.least if starting and not asked.fixed else 1
        if placed >= asked.least or waiting_seconds < _NEVER_SECONDS:
            self._said_at = None
            return
        if placed >= needed and (self._said_few or not asked.fixed):
            return
        now, sizes = self._clock(), node_sizes()
        if sizes != self._sizes or self._said_at is None:
            self._sizes, self._grown_at = sizes, now
        holds = capacity(sizes, self._gpus)
        if waiting_seconds < _TAKEN_SECONDS and holds >= (needed if placed < needed else asked.least):
            return
        if placed < needed:
            enough = holds >= needed
            self._say_none(asked, needed, placed, waiting_seconds)
            if starting and not enough and now - self._grown_at >= _HOPELESS_SECONDS and not may_grow():
                raise ResourceError(self._never(asked, needed))
        elif asked.fixed and not self._said_few:
            self._said_few = True
            _logger.warning(
                "%d of %d worker(s) have a place and do the work; %s", placed, asked.least, self._why(asked)
            )

    def _say_none(self, asked: WorkerRange, needed: int, placed: int, waited: float) -> None:
        now = self._clock()
        if self._said_at is not None and now - self._said_at < _AGAIN_SECONDS:
            return
        first, self._said_at = self._said_at is None, now
        few = "no worker has a place" if not placed else f"{placed} of at least {needed} workers have a place"
        when = "yet" if first else f"after {waited:.0f} s"
        _logger.warning("%s %s: %s", few, when, self._why(asked))

    def _why(self, asked: WorkerRange) -> str:
        """What is asked for, what there is, and what helps."""
        remedy = "start nodes with 'ray start --address=...'" + (", or lower --gpus-per-worker" if self._gpus else "")
        if capacity(self._sizes, self._gpus) >= asked.least:
            remedy = "end what else runs there, or " + remedy
        return (
            f"{asked} worker(s) were asked for, each needs {self._needs}, and {self._found()}; waiting for room, 'ray "
            f"status' shows demand; {remedy}"
        )

    def _never(self, asked: WorkerRange, needed: int) -> str:
        lower = "" if asked.fixed or not capacity(self._sizes, self._gpus) else ", or lower --workers"
        lower += ", lower --gpus-per-worker or use --device cpu" if self._gpus else ""
        return (
            f"ray: the cluster cannot hold {needed} worker(s) of {self._needs} each: {self._found()}; it has no "
            f"autoscaler, and no node came within {_HOPELESS_SECONDS:.0f} s; start nodes with 'ray start "
            f"--address=...' before the run{lower}"
        )

    @property
    def _needs(self) -> str:
        return f"1 CPU and {self._gpus:g} GPU" if self._gpus else "1 CPU"

    def _found(self) -> str:
        """What the nodes have, and how much of it is free."""
        sizes = self._sizes
        counted = sorted(Counter(sizes).items(), reverse=True)[:4]
        nodes = ", ".join(f"{n} of {cpus:g} CPU and {gpus:g} GPU" for (cpus, gpus), n in counted) or "none"
        holds = capacity(sizes, self._gpus)
        what = f"all nodes together have room for {holds}" if holds else "no node has that"
        return f"{what} (nodes: {nodes}; free: {_free()})"


def _free() -> str:
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU"
