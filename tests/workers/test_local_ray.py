"""The local Ray's own processes are killed: a new one is started, and no more is lost than the calls in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import ray._private.worker

import was_workers.pool as pool_module
from tests.doubles.ask import Ask
from tests.doubles.bowl_worker import bowl_worker
from was_search.errors import ResourceError
from was_workers.cluster import Cluster, connect
from was_workers.local_ray import dead_process, end_processes, family
from was_workers.pool import Pool
from was_workers.worker import WorkerSpec

SPEC = WorkerSpec("m", "", "float32", "cpu", "l2")


@pytest.mark.ray
@pytest.mark.own_ray
@pytest.mark.slow
def test_a_killed_raylet_costs_the_calls_in_flight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog, capfd
) -> None:
    """Before, Ray's C++ ended the coordinator with its status 1 and pages of a state dump."""
    monkeypatch.setattr(pool_module, "Worker", bowl_worker(tmp_path))
    with connect("local", workers=2) as cluster, Pool(cluster, SPEC, n_workers=2, gpus_per_worker=0.0) as pool:
        shared = pool.share([1, 2, 3])
        (came_back, *_), _ = pool.map([Ask("shard", shared), Ask("shard", 5)])
        assert came_back.value == [1, 2, 3]
        while pool.n_idle < 2:
            pool.turn(0.2)
        held = [tmp_path / "held-0", tmp_path / "held-1"]
        for file in held:
            file.touch()
        tickets = [pool.submit(Ask("shard", shared)), pool.submit(Ask("shard", 7))]
        (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        raylet.process.wait()
        found = []
        while len(found) < 2:
            found += pool.wait(0.5)
        assert sorted(outcome.ticket for outcome in found) == tickets
        assert all(outcome.lost and outcome.blameless for outcome in found)
        for file in held:
            file.unlink()
        again = pool.map([Ask("shard", shared), Ask("shard", 8)])
        assert again[0][0].value == [1, 2, 3], "what was shared is there again"
        assert {number for _, number, _ in again} <= {0, 1}, "the workers are the same"
    assert (
        "the local Ray is started again, and the workers load the model again: its raylet was killed by signal 9"
        in (caplog.text)
    )
    printed = "".join(capfd.readouterr())
    assert "state-dump" not in printed and "(raylet)" not in printed


@pytest.mark.ray
@pytest.mark.own_ray
@pytest.mark.slow
def test_nothing_of_a_raylet_that_has_no_time_to_end_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine: Ray kills it after a second, and its agents would live for another minute."""
    with connect("local", workers=1):
        node = ray._private.worker._global_node
        (raylet,) = node.all_processes["raylet"]
        agents = psutil.Process(raylet.process.pid).children(recursive=True)
        assert any("Agent" in each.name() for each in agents)
        end = node.kill_all_processes

        def frozen(**options: Any) -> None:
            os.kill(raylet.process.pid, signal.SIGSTOP)
            end(**options)

        monkeypatch.setattr(node, "kill_all_processes", frozen)
    assert not psutil.wait_procs(agents, timeout=5)[1]


def test_a_process_that_took_the_id_of_another_is_left_alone() -> None:
    process = subprocess.Popen(["bash", "-c", "sleep 600 & wait"])
    (child,) = wait_for(lambda: psutil.Process(process.pid).children())
    bash = psutil.Process(process.pid)
    found = family([psutil.Process(process.pid)])
    assert {each.pid for each in found} == {process.pid, child.pid}
    found[0]._ident = (process.pid, 1.0)  # as if it had been another that was started long ago
    end_processes(found)
    assert not psutil.wait_procs([child], timeout=20)[1]
    assert process.wait(20) == 0, "bash was not killed: it ended after its child"
    assert not family([child, bash])


def wait_for(look: Any) -> Any:
    end = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A local Ray of two processes that wait for ever."""
    processes = {name: subprocess.Popen(["sleep", "600"]) for name in ("raylet", "gcs_server")}
    listed = {name: [SimpleNamespace(process=process)] for name, process in processes.items()}
    monkeypatch.setattr(ray._private.worker, "_global_node", SimpleNamespace(all_processes=listed))
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_what_has_died_and_how(node: Any, name: str) -> None:
    assert dead_process() == ""
    node[name].kill()
    node[name].wait()
    assert dead_process() == f"its {name} was killed by signal 9"
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    ended.wait()
    ray._private.worker._global_node.all_processes[name] = [SimpleNamespace(process=ended)]
    assert dead_process() == f"its {name} ended with status 3"


def test_where_no_ray_runs_none_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    assert dead_process() == ""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pool whose actors are nothing, on a local Ray that has died."""
    started: list[Cluster] = []
    monkeypatch.setattr(pool_module, "start_anew", started.append)
    monkeypatch.setattr(pool_module, "dead_process", lambda: "its raylet was killed by signal 9")
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: pytest.fail("Ray would end this process"))
    never = SimpleNamespace(remote=lambda *args: object())
    remote = SimpleNamespace(remote=lambda *args: SimpleNamespace(place=never))
    monkeypatch.setattr(ray, "remote", lambda cls: SimpleNamespace(options=lambda **options: remote))
    monkeypatch.setattr(ray, "wait", lambda *args, **options: ([], []))

    def make(local: bool) -> Pool:
        pool = Pool(Cluster(local, "local", 2, 0), SPEC, n_workers=1, gpus_per_worker=0.0)
        pool.started = started  # type: ignore[attr-defined]
        return pool

    return make


def test_one_that_dies_again_and_again_is_not_started_for_ever(pool: Any) -> None:
    found = pool(local=True)
    for _ in range(3):
        found.turn(0.0)
    with pytest.raises(
        ResourceError, match=r"died 4 times within 10 minutes; .* its raylet was killed by signal 9; if"
    ):
        found.turn(0.0)
    assert len(found.started) == 3
    found._deaths = [time.monotonic() - 601] * 9
    found.turn(0.0)
    assert len(found.started) == 4, "long ago is forgotten"


def test_a_cluster_is_not_started_anew(pool: Any) -> None:
    found = pool(local=False)
    found.turn(0.0)
    assert not found.started


def test_actors_of_a_dead_ray_are_not_killed(pool: Any) -> None:
    found = pool(local=True)
    found.close()
    assert not found._members.all
