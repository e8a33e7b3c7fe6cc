"""An elastic pool on a real Ray cluster of several nodes on this machine: nodes come, are drained, and go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

import was_workers.pool as pool_module
import was_workers.room as room_module
from tests.doubles.ask import Ask
from tests.doubles.bowl_worker import bowl_worker, evaluations
from tests.doubles.loop_doubles import BRIEF, SHAPE, search_options, seeds
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.health import QuarantinePolicy
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.search_progress import SearchProgress
from was_search.errors import ResourceError
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import SlotState
from was_search.studies.worker_range import WorkerRange
from was_workers.cluster import Cluster, connect
from was_workers.local_ray import end_processes, family, ray_processes
from was_workers.pool import Pool
from was_workers.worker import WorkerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow(seconds=20)]

HEAD = {"num_cpus": 0, "include_dashboard": False}
SPEC = WorkerSpec("m", "", "float32", "cpu", "l2")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without processors; tests add nodes, and take them away again."""
    made = Nodes(initialize_head=True, head_node_args={**HEAD, "include_log_monitor": False})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes: Nodes) -> Iterator[Cluster]:
    with connect(nodes.address, workers=1) as found:
        yield found


@pytest.fixture
def add(nodes: Nodes) -> Iterator[Callable[[], Any]]:
    """A new node with one processor."""
    added = []

    def make() -> Any:
        for left in reversed(range(3)):
            before = ray_processes()
            try:
                added.append(nodes.add_node(num_cpus=1, object_store_memory=80_000_000, include_log_monitor=False))
                return added[-1]
            except Exception as error:  # Ray gives a node 30 s, which a busy machine may not keep
                if not left or "timed out" not in str(error):
                    raise
                end_processes(family(ray_processes() - before))
        raise AssertionError

    yield make
    for node in added:
        if node in nodes.list_all_nodes():
            nodes.remove_node(node, allow_graceful=False)


@pytest.fixture
def start(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    """A pool of bowl workers."""
    opened: list[Pool] = []

    def make(n_workers: str, **options: Any) -> Pool:
        monkeypatch.setattr(pool_module, "Worker", bowl_worker(tmp_path))
        asked = WorkerRange.parse(n_workers)
        opened.append(Pool(cluster, SPEC, n_workers=asked, gpus_per_worker=0.0, **options))
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()


ENDLESS = 300.0
"""Seconds that no test needs, on however busy a machine: who waits so long is stuck."""


def until(pool: Pool, condition: Callable[[PoolState], bool]) -> list[Any]:
    """Outcomes until the pool's state is so."""
    end, found = time.monotonic() + ENDLESS, []
    while not condition(pool.state):
        assert time.monotonic() < end, pool.state
        found += pool.wait(0.2)
    return found


def ended(pool: Pool, n: int) -> list[Any]:
    """The next ``n`` outcomes."""
    end, found = time.monotonic() + ENDLESS, []
    while len(found) < n:
        assert time.monotonic() < end, pool.state
        found += pool.wait(0.2)
    return found


def wait_for_nodes_to_go() -> None:
    """Until Ray knows that those of the tests before are gone."""
    end = time.monotonic() + ENDLESS
    while any(node["Alive"] and node["Resources"].get("CPU") for node in ray.nodes()):
        assert time.monotonic() < end, ray.nodes()
        time.sleep(0.2)


def drain(nodes: Nodes, node_id: str, seconds: float = 0.0) -> None:
    """What Ray's autoscaler does before it takes a node away, or what passes a preemption notice on."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gone_by = int(1000 * (time.time() + seconds)) if seconds else 0
    accepted, why = GcsClient(address=nodes.address).drain_node(node_id, reason, "preempted", gone_by)
    assert accepted, why


def alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def demands(nodes: Nodes) -> int:
    """Actors that Ray's autoscaler is asked to find room for."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    found = get_cluster_status(nodes.address).resource_demands.ray_task_actor_demand
    return sum(bundle.count for demand in found for bundle in demand.bundles_by_count)


def test_a_pool_takes_what_the_cluster_gives_and_asks_for_the_rest(nodes: Nodes, add, start) -> None:
    add()
    pool = start("1:3")
    pool.wait_for_least(ENDLESS)
    assert pool.state == PoolState("1:3", ready=1, pending=2)
    end = time.monotonic() + ENDLESS
    while demands(nodes) != 2:  # Ray reports what waits every few seconds
        assert time.monotonic() < end, demands(nodes)
        pool.wait(0.2)
    add()
    until(pool, lambda state: state.ready == 2)
    places = {node for _, node in pool.map([Ask("where")] * 8)}
    assert len(places) == 2
    pool.need(2)
    until(pool, lambda state: state == PoolState("1:3", ready=2))
    end = time.monotonic() + ENDLESS
    while demands(nodes):
        assert time.monotonic() < end, "what is not useful is still asked for"
        pool.wait(0.2)
    pool.need(1)
    until(pool, lambda state: state == PoolState("1:3", ready=1))
    pool.resize(WorkerRange(2, 2))
    until(pool, lambda state: state == PoolState("2", ready=2))


def test_a_cluster_without_a_node_for_a_worker_says_so_and_waits(add, start, monkeypatch, caplog) -> None:
    monkeypatch.setattr(room_module, "_NEVER_SECONDS", 0.0)
    wait_for_nodes_to_go()
    pool = start("1")
    with pytest.raises(ResourceError, match="no worker had loaded its model within 2 s"):
        pool.wait_idle(2.0)
    assert (
        "no worker has a place yet: 1 worker(s) were asked for, each needs 1 CPU, and no node has that" in caplog.text
    )
    add()
    pool.wait_idle(ENDLESS)


def test_a_start_that_no_node_has_room_for_ends(nodes: Nodes, start, monkeypatch) -> None:
    """The head's own autoscaler only reports nodes; it is no reason to wait."""
    monkeypatch.setattr(room_module, "_HOPELESS_SECONDS", 3.0)
    wait_for_nodes_to_go()
    began = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"cannot hold 1 worker\(s\) of 1 CPU each: no node has that .*no autoscaler"
    ):
        start("4").wait_for_least(ENDLESS)
    assert time.monotonic() - began < ENDLESS / 2


def test_fewer_places_than_the_least_number_are_an_error(add, start) -> None:
    add()
    with pytest.raises(ResourceError, match="fewer than 2 workers had loaded their model within 6 s; are there enough"):
        start("2:4").wait_for_least(6)


def test_a_worker_on_a_draining_node_ends_its_call_and_gets_no_other(
    nodes: Nodes, add, start, tmp_path: Path, caplog
) -> None:
    add(), add()
    pool = start("2")
    until(pool, lambda state: state.ready == 2)
    where = dict(pool.map([Ask("where")] * 8))
    held = [tmp_path / "held-0", tmp_path / "held-1"]
    for file in held:
        file.touch()
    tickets = [pool.submit(Ask("shard", 0)), pool.submit(Ask("shard", 1))]
    going = where[0]
    drain(nodes, going, seconds=2 * ENDLESS)
    until(pool, lambda state: state.draining == 1)
    assert pool.state == PoolState("2", ready=1, pending=1, draining=1), "another one is asked for at once"
    assert re.search(r"gets no more to do: its node is drained and goes in \d+ s", caplog.text)
    for file in held:
        file.unlink()
    found = ended(pool, 2)
    assert pool.state.draining == 0
    assert {outcome.ticket for outcome in found} == set(tickets)
    assert all(outcome.error is None for outcome in found), "a drain loses nothing where there is time"
    end = time.monotonic() + ENDLESS
    while alive(going):
        assert time.monotonic() < end, "Ray lets a drained node go once nothing is left on it"
        pool.wait(0.2)
    add()
    until(pool, lambda state: state.ready == 2)
    assert going not in {node for _, node in pool.map([Ask("where")] * 8)}


def test_a_call_that_outlasts_its_node_comes_back_without_blame(nodes: Nodes, add, start) -> None:
    add(), add()
    pool = start("2")
    until(pool, lambda state: state.ready == 2)
    pool.submit(Ask("nap", 600.0))
    ((ticket, index, _),) = pool.running
    (node,) = [member.place.node for member in pool._members.all if member.index == index]
    drain(nodes, node, seconds=8)
    found = ended(pool, 1)
    assert [(o.ticket, o.lost, o.blameless, o.index) for o in found] == [(ticket, True, True, index)]
    until(pool, lambda state: state == PoolState("2", ready=1, pending=1))


def test_a_node_that_gets_a_sigterm_is_drained(nodes: Nodes, start, tmp_path: Path) -> None:
    """What a pod's end or a cloud's preemption does to `ray start --block`."""
    log = (tmp_path / "node.log").open("wb")

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                *(f"--address={nodes.address}", f"--node-ip-address={nodes.head_node.node_ip_address}"),
                *("--num-cpus=1", "--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"),
            ],
            env={**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(int(2 * ENDLESS))},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    process = started()

    def ready(state: PoolState) -> bool:
        nonlocal process
        if process.poll() is not None:  # Ray gives a node 30 s, which a busy machine may not keep
            assert "timed out" in (tmp_path / "node.log").read_text()
            process = started()
        return state.ready == 1

    held = tmp_path / "held-0"
    held.touch()
    try:
        pool = start("1")
        until(pool, ready)
        ticket = pool.submit(Ask("shard", 0))
        process.terminate()
        until(pool, lambda state: state.draining == 1)
        assert pool.state.pending == 1
        held.unlink()
        assert [(outcome.ticket, outcome.error) for outcome in ended(pool, 1)] == [(ticket, None)]
        assert process.wait(ENDLESS) != 0, "Ray takes the node away once its worker has gone"
    finally:
        process.kill()
        process.wait()
        log.close()


def test_a_search_goes_through_nodes_that_come_and_go(nodes: Nodes, add, start, tmp_path: Path) -> None:
    """Every slot is finished once; the drained node's worker gets nothing more, the new one its share."""
    add(), add()
    # Who is held here for as long as a node takes to come is not to be taken for a worker that hangs.
    pool = start("2:3", useful=60, policy=QuarantinePolicy(slowdown=0.0))
    pool.wait_for_least(ENDLESS)
    before = dict(pool.map([Ask("where")] * 12))
    # Of the three that are asked for any two find the places that there are.
    (going, staying), (new,) = sorted(before), {0, 1, 2} - set(before)
    states: list[PoolState] = []
    drained: list[int] = []
    held = [tmp_path / f"held-{going}", tmp_path / f"held-{staying}"]

    def progress(shown: SearchProgress) -> None:
        states.append(shown.pool)
        if shown.current is not None and shown.finished == 8:
            for file in held:  # a new node takes seconds, the other evaluations of this test as long
                file.touch()
            add()
        if not drained and new in evaluations(tmp_path):
            held[1].unlink(missing_ok=True)
            drained.append(len(states))
            drain(nodes, before[going], seconds=2 * ENDLESS)
        if shown.pool.draining:
            held[0].unlink(missing_ok=True)

    store = MemorySlots(60)
    options = search_options(trial_timeout=120.0, **BRIEF)
    loop = SearchLoop(
        store, pool, "data", "histograms",
        shape=SHAPE, seeds=seeds(), options=options, drain=threading.Event(), progress=progress,
    )  # fmt: skip
    slots = loop.run()
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert sorted(store.finishes) == list(range(60))
    began = evaluations(tmp_path)
    assert len(began) == 60, "nothing was evaluated twice"
    assert set(began) == {0, 1, 2}
    assert began.count(new) > 5
    assert any(state.draining or state.pending for state in states[drained[0] :])
    assert pool.state.asked == "2:3"
    assert pool.n_workers <= 3
