"""The faults. Each strikes a live process with work in flight, or reports that there was none and does nothing."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos import processes
from tests.chaos.cluster import Cluster, Coordinator, RayNode, Running

_IN_TRANSACTION = (
    "SELECT pg_terminate_backend(pid), application_name FROM pg_stat_activity "
    "WHERE application_name LIKE 'was-search%' AND xact_start IS NOT NULL "
    "AND (state = 'idle in transaction' OR query LIKE 'UPDATE%' OR query LIKE 'INSERT%' OR query LIKE 'COMMIT%')"
)


@dataclass
class Hit:
    """What a fault struck. ``lost`` are the slots, with their attempt, whose evaluation it ended or made late."""

    fault: str
    what: str
    lost: list[tuple[int, int]] = field(default_factory=list)


Fault = Callable[[Cluster, random.Random], Hit | None]


def kill_worker(cluster: Cluster, rng: random.Random) -> Hit | None:
    """SIGKILL to a worker that is evaluating."""
    struck = _busy_worker(cluster, rng)
    if struck is None:
        return None
    with processes.frozen(struck.pid):
        if struck not in cluster.busy():
            return None
        processes.send(struck.pid, signal.SIGKILL)
    return Hit("kill worker", f"process {struck.pid}, slot {struck.number}", _lost([struck]))


def kill_node(cluster: Cluster, rng: random.Random) -> Hit | None:
    """SIGKILL to the raylet of a node with a worker that is evaluating; another node takes its place."""
    nodes = [(node, raylet) for node in cluster.nodes if (raylet := node.raylet) is not None]
    rng.shuffle(nodes)
    for node, raylet in nodes:
        workers = processes.children(raylet)
        struck = [slot for slot in cluster.busy() if slot.pid in workers]
        if struck:
            return _kill_raylet(cluster, node, raylet, struck[0])
    return None


def _kill_raylet(cluster: Cluster, node: RayNode, raylet: int, struck: Running) -> Hit | None:
    with processes.frozen(struck.pid):
        if struck not in cluster.busy():
            return None
        processes.send(raylet, signal.SIGKILL)
        time.sleep(0.1)
        processes.send(struck.pid, signal.SIGKILL)  # a machine's end is theirs; Ray's workers may live on and reply
    cluster.replace(node)
    return Hit("kill node", f"{node.name}, slot {struck.number} on process {struck.pid}", _lost([struck]))


def kill_coordinator(cluster: Cluster, rng: random.Random) -> Hit | None:
    """SIGKILL to the coordinator while slots run."""
    coordinator = _coordinator(cluster)
    if coordinator is None:
        return None
    with processes.frozen(coordinator.process.pid):
        time.sleep(0.1)  # what it has sent to the database is done by now
        struck = cluster.busy()
        if not struck or coordinator.process.poll() is not None:
            return None
        coordinator.killed = True
        processes.send(coordinator.process.pid, signal.SIGKILL)
    coordinator.process.wait()
    return Hit("kill coordinator", f"process {coordinator.process.pid}, {len(struck)} slots", _lost(struck))


def restart_postgres(mode: str) -> Fault:
    """Postgres stops in ``mode`` (fast or immediate) while slots run, and comes back within a few seconds."""

    def fault(cluster: Cluster, rng: random.Random) -> Hit | None:
        pid, struck = cluster.postgres.pid, cluster.busy()
        if not struck or not processes.alive(pid):
            return None
        cluster.postgres.stop(mode)
        time.sleep(rng.uniform(0.0, 3.0))
        cluster.postgres.start()
        return Hit(f"restart Postgres, {mode}", f"process {pid}, {len(struck)} slots")

    return fault


def cut_connection(cluster: Cluster, rng: random.Random) -> Hit | None:
    """A session of the coordinator ends in mid-transaction, before it has written or after.

    Transactions last a moment, and on a busy machine none may be seen: then one is made to wait before it writes.
    """
    if cut := _cut_in_transaction(cluster, 2.0):
        return cut
    with cluster.postgres.writes_held():
        return _cut_in_transaction(cluster, 10.0)


def _cut_in_transaction(cluster: Cluster, seconds: float) -> Hit | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        cut = cluster.postgres.query(_IN_TRANSACTION)
        if cut and cluster.running():
            return Hit("cut a transaction", ", ".join(row.application_name for row in cut))
    return None


def cut_all_connections(cluster: Cluster, rng: random.Random) -> Hit | None:
    """All sessions of the coordinator end, that with its lock among them."""
    if not cluster.busy():
        return None
    cut = cluster.postgres.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'was-search%'"
    )
    return Hit("cut all connections", f"{len(cut)} sessions") if cut else None


def delay_reply(cluster: Cluster, rng: random.Random) -> Hit | None:
    """A worker that is evaluating stands still until long past the deadline, and then goes on."""
    struck = _busy_worker(cluster, rng)
    if struck is None:
        return None
    processes.send(struck.pid, signal.SIGSTOP)
    if struck not in cluster.busy():
        processes.send(struck.pid, signal.SIGCONT)
        return None
    cluster.delayed.add(struck.pid)
    thaw = threading.Timer(cluster.plan.trial_timeout * 1.5, _thaw, (cluster, struck.pid))
    thaw.daemon = True
    thaw.start()
    return Hit("delay a reply", f"process {struck.pid}, slot {struck.number}", _lost([struck]))


def second_coordinator(cluster: Cluster, rng: random.Random) -> Hit | None:
    """The same command once more, while the first lives and slots run. One of the two has to go."""
    if len(cluster.coordinators) != 1 or not cluster.busy():
        return None
    rival = cluster.start_coordinator()
    return Hit("second coordinator", f"coordinator {rival.number}")


def replace_coordinator(cluster: Cluster, rng: random.Random) -> Hit | None:
    """The coordinator stands still and loses its connections; another takes over; then the first goes on."""
    first = _coordinator(cluster)
    if first is None or len(cluster.coordinators) != 1:
        return None
    with processes.frozen(first.process.pid):
        struck, before = cluster.busy(), cluster.epoch()
        if not struck or first.process.poll() is not None:
            return None
        mine = f"%:{first.process.pid}"
        cluster.postgres.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE :mine", mine=mine
        )
        second = cluster.start_coordinator()
        cluster.wait_until(
            f"coordinator {second.number} takes over from a frozen one", lambda: cluster.epoch() > before, 300
        )
    return Hit("replace coordinator", f"{first.number} by {second.number}", _lost(struck))


FAULTS: dict[str, tuple[float, Fault]] = {
    "kill worker": (5, kill_worker),
    "kill node": (2, kill_node),
    "kill coordinator": (2, kill_coordinator),
    "restart Postgres, fast": (2, restart_postgres("fast")),
    "restart Postgres, immediate": (2, restart_postgres("immediate")),
    "cut a transaction": (4, cut_connection),
    "cut all connections": (2, cut_all_connections),
    "delay a reply": (3, delay_reply),
    "second coordinator": (1, second_coordinator),
    "replace coordinator": (1, replace_coordinator),
}
"""By name: how often relative to the others, and the fault."""


def _lost(struck: list[Running]) -> list[tuple[int, int]]:
    return [(slot.number, slot.attempt) for slot in struck]


def _busy_worker(cluster: Cluster, rng: random.Random) -> Running | None:
    busy = cluster.busy()
    return rng.choice(busy) if busy else None


def _thaw(cluster: Cluster, pid: int) -> None:
    processes.send(pid, signal.SIGCONT)
    cluster.delayed.discard(pid)


def _coordinator(cluster: Cluster) -> Coordinator | None:
    """The oldest that lives."""
    living = [one for one in cluster.coordinators if one.process.poll() is None]
    return living[0] if living else None
