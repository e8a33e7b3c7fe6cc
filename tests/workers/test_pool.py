"""The pool on a real local Ray, with workers that do as they are told instead of holding a model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

import was_workers.pool as pool_module
from tests.doubles.ask import Ask
from tests.doubles.bowl_worker import bowl_worker
from was_search import __version__
from was_search.errors import ConfigError, DeviceLostError, InfeasibleError, ModelError, ResourceError, TransientError
from was_search.studies.worker_range import WorkerRange
from was_workers.calls_in_flight import PREPARE, CallEnd, CallInFlight, CallsInFlight
from was_workers.cluster import Cluster, connect
from was_workers.member import Member
from was_workers.members import PREPARE_SECONDS, Members
from was_workers.pool import Pool
from was_workers.size import fitting
from was_workers.threads import ThreadShare
from was_workers.worker import Place, WorkerInfo, WorkerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ENDLESS = 300.0
"""Seconds that no test needs, on however busy a machine: who waits so long is stuck."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect("local", workers=2) as found:
        yield found


@pytest.fixture
def pool(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``pool(failing=...)``: two workers; with ``failing`` the one that makes the marker file cannot load."""
    opened: list[Pool] = []

    def start(failing: str = "") -> Pool:
        class Told:  # local, so that Ray ships it by value
            def __init__(self, spec: WorkerSpec, number: int = 0) -> None:
                self.spec = spec

            def place(self) -> Place:
                return Place(ray.get_runtime_context().get_node_id(), "host", os.getpid())

            def prepare(self) -> Any:
                marker = tmp_path / "first"
                try:
                    marker.touch(exist_ok=False)
                except FileExistsError:
                    if failing == "second":
                        while not (tmp_path / "answered").exists():
                            time.sleep(0.05)
                        raise ModelError("no such folder on this node") from None
                if failing == "all":
                    raise ModelError("not a checkpoint")
                version = "0.0.1" if failing == "version" else __version__
                return WorkerInfo("host", os.getpid(), "cpu", None, version, 0.0)

            def run(self, call: Any, about: Any) -> Any:
                return call.run(self)

            def echo(self, value: Any) -> Any:
                (tmp_path / "answered").touch()
                return value, os.getpid()

            def nap(self, seconds: float) -> int:
                time.sleep(seconds)
                return os.getpid()

            def fail(self, error: BaseException) -> None:
                raise error

            def once(self, marker: Path, how: str) -> int:
                if not marker.exists():
                    marker.touch()
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    elif how == "hang":
                        time.sleep(600)
                    elif how == "device":
                        raise DeviceLostError("CUDA error: an illegal memory access was encountered")
                    raise TransientError("GPU out of memory")
                return os.getpid()

        monkeypatch.setattr(pool_module, "Worker", Told)
        spec = WorkerSpec("m", "", "float32", "cpu", "l2")
        opened.append(Pool(cluster, spec, n_workers=2, gpus_per_worker=0.0))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def both(pool: Pool) -> set[int]:
    """Process ids of the two workers, once both are ready."""
    end = time.monotonic() + ENDLESS
    while pool.n_idle < 2:
        assert time.monotonic() < end
        pool.wait(0.2)
    return {pid for _, pid in pool.map([Ask("echo", i) for i in range(12)])}


def test_map_keeps_the_order_of_its_calls(pool) -> None:
    found = pool().map([Ask("echo", i) for i in range(7)])
    assert [value for value, _ in found] == list(range(7))


def test_the_work_done_is_counted(pool) -> None:
    opened = pool()
    opened.wait_idle(ENDLESS)
    done = opened.work_done
    assert (done.calls, done.busy_seconds, done.stored_bytes) == (0, 0.0, 0), "loading is no call of the user's"
    opened.map([Ask("nap", 0.2), Ask("nap", 0.2)])
    assert done.calls == 2
    assert done.busy_seconds >= 0.4
    assert done.stored_bytes == 0, "small replies go past the object store"
    opened.share(bytes(10**6))
    assert 10**6 <= done.stored_bytes < 1.1 * 10**6
    opened.map([Ask("echo", bytes(10**6))])
    assert 2 * 10**6 <= done.stored_bytes < 2.2 * 10**6, "the reply counts, the call's own argument does not"
    with pytest.raises(InfeasibleError):
        opened.map([Ask("fail", InfeasibleError("scores are not finite"))])
    assert done.calls == 3


def test_an_error_of_the_call_itself_is_raised(pool) -> None:
    with pytest.raises(InfeasibleError, match="not finite"):
        pool().map([Ask("fail", InfeasibleError("scores are not finite"))])


@pytest.mark.parametrize("how", ["kill", "hang", "device", "memory"])
def test_a_lost_call_is_repeated(pool, tmp_path: Path, how: str) -> None:
    opened = pool()
    before = both(opened)
    deadline = 10.0 if how == "hang" else ENDLESS
    (pid,) = opened.map([Ask("once", tmp_path / how, how)], deadline_seconds=deadline)
    assert pid > 0
    after = both(opened)
    # out of memory leaves the process, the others replace it
    assert (after <= before) == (how == "memory")


def test_a_model_that_no_worker_can_load_is_an_error(pool) -> None:
    with pytest.raises(ModelError, match="not a checkpoint"):
        pool(failing="all").wait_idle(ENDLESS)


def test_one_node_that_lacks_the_model_is_let_go(pool) -> None:
    opened = pool(failing="second")
    assert len(opened.map([Ask("echo", i) for i in range(30)])) == 30
    end = time.monotonic() + ENDLESS
    while opened.n_workers == 2 and time.monotonic() < end:
        opened.wait(0.2)
    assert opened.n_workers == 1
    assert len(opened.map([Ask("echo", 1)])) == 1


def test_calls_left_over_by_an_error_do_not_disturb_the_next_map(pool) -> None:
    opened = pool()
    with pytest.raises(InfeasibleError):
        opened.map([Ask("fail", InfeasibleError("no")), Ask("echo", 1), Ask("echo", 2)])
    assert [value for value, _ in opened.map([Ask("echo", i) for i in range(5)])] == list(range(5))


def until_idle(pool: Pool, n: int) -> None:
    end = time.monotonic() + ENDLESS
    while pool.n_idle != n or pool.n_loaded != n:
        assert time.monotonic() < end
        pool.turn(0.2)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_pool_grows_beyond_the_processors_and_shrinks(pool) -> None:
    """A local Ray counts processors (here two, or the machine's): no worker may wait for one."""
    opened = pool()
    more = 2 + (os.cpu_count() or 1)
    opened.resize(more)
    assert opened.n_workers == more
    until_idle(opened, more)
    opened.resize(1)
    assert (opened.n_workers, opened.n_idle, opened.n_loaded) == (1, 1, 1)
    assert len({pid for _, pid in opened.map([Ask("echo", i) for i in range(4)])}) == 1


def test_shrinking_lets_idle_workers_go_first_and_loses_no_call(pool) -> None:
    opened = pool()
    until_idle(opened, 2)
    opened.resize(3)
    until_idle(opened, 3)
    tickets = {opened.submit(Ask("nap", 2.0)), opened.submit(Ask("nap", 2.0))}
    opened.resize(2)
    assert (opened.n_workers, opened.n_idle) == (2, 0), "the idle one has gone"
    opened.resize(1)
    assert (opened.n_workers, opened.n_loaded) == (1, 2), "a busy one stays until its call has ended"
    found = []
    while len(found) < 2:
        found += opened.wait(1.0)
    assert {outcome.ticket for outcome in found} == tickets
    assert all(outcome.error is None for outcome in found)
    assert (opened.n_workers, opened.n_loaded, opened.n_idle) == (1, 1, 1)
    end = time.monotonic() + ENDLESS
    while sum(alive(outcome.value) for outcome in found) > 1:
        assert time.monotonic() < end, "a worker that was let go is still there"
        time.sleep(0.1)


def test_a_worker_about_to_go_stays_where_more_are_wanted_again(pool) -> None:
    opened = pool()
    until_idle(opened, 2)
    before = both(opened)
    tickets = [opened.submit(Ask("nap", 1.0)), opened.submit(Ask("nap", 1.0))]
    opened.resize(1)
    opened.resize(2)
    ended: set[int] = set()
    while len(ended) < 2:
        ended |= {outcome.ticket for outcome in opened.wait(1.0)}
    assert ended == set(tickets)
    assert both(opened) == before


def test_a_worker_that_dies_while_it_is_about_to_go_is_not_restarted(pool, tmp_path: Path) -> None:
    opened = pool()
    until_idle(opened, 2)
    opened.submit(Ask("nap", 600.0))
    ticket = opened.submit(Ask("once", tmp_path / "killed", "kill"))
    opened.resize(1)
    leaving = [member for member in opened._members.all if member.leaving]
    lost = []
    while not lost:
        lost = opened.wait(1.0)
    assert [(outcome.ticket, outcome.lost) for outcome in lost] == [(ticket, True)]
    assert opened.n_workers == 1
    assert len(opened._members.all) == (1 if leaving[0].info.name in lost[0].worker else 2)


def test_abandoned_calls_never_come_back_and_the_workers_do(pool) -> None:
    opened = pool()
    before = both(opened)
    opened.submit(Ask("nap", 600.0))
    opened.submit(Ask("nap", 600.0))
    opened.abandon()
    assert opened.n_idle == 0
    until_idle(opened, 2)
    after = {pid for _, pid in opened.map([Ask("echo", i) for i in range(12)])}
    assert after.isdisjoint(before)


def test_a_pool_has_at_least_one_worker(pool) -> None:
    with pytest.raises(ConfigError, match="workers: must be at least 1, got 0"):
        pool().resize(0)


def test_growing_beyond_the_gpus_changes_nothing(pool) -> None:
    opened = pool()
    opened._gpus_per_worker = 0.5
    with pytest.raises(ResourceError, match=r"4 worker\(s\) with 0.5 GPU each were asked for and this machine has 0"):
        opened.resize(4)
    assert opened.n_workers == 2


def test_more_gpus_than_the_machine_has(cluster: Cluster) -> None:
    spec = WorkerSpec("m", "", "float32", "cuda", "l2")
    with pytest.raises(ResourceError, match=r"2 worker\(s\) with 0.5 GPU each were asked for and this machine has 0"):
        Pool(Cluster(True, "local", 2, 0), spec, n_workers=2, gpus_per_worker=0.5)


def test_a_worker_of_another_version_is_refused_with_both_named(pool) -> None:
    with pytest.raises(ResourceError, match=rf"runs was-search 0\.0\.1 and the coordinator {__version__}; install"):
        pool(failing="version").wait_idle(ENDLESS)


def without_ray() -> Members:
    """Members whose actors are nothing."""
    threads = ThreadShare(0, divided=False)
    return Members(CallsInFlight(), lambda number: None, threads=threads, goes=lambda node: False)


def test_a_restart_that_takes_long_is_waited_for_and_failures_are_not() -> None:
    """Ray answers that the actor is unavailable for as long as it restarts: on a busy machine, many times."""
    members = Members(
        CallsInFlight(), lambda number: None, threads=ThreadShare(0, divided=False), goes=lambda node: False
    )
    member = Member(0, None)
    ending = CallEnd(CallInFlight(member, PREPARE), gone=ActorUnavailableError("The actor is restarting.", None))
    for _ in range(100):
        members.settle(ending)
    assert member.failures == 0
    assert len(members._recovering) == 100
    member.unreachable_since -= PREPARE_SECONDS
    members.settle(ending)
    assert member.failures == 1


def test_a_node_without_its_gpu_ends_nothing_while_others_still_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer may come from the sick one; only the last that fails says that nobody can."""
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: killed.append(actor))
    members = Members(
        CallsInFlight(), lambda number: None, threads=ThreadShare(0, divided=False), goes=lambda node: False
    )
    members.all = [Member(i, f"actor-{i}", place=Place("node", "host", i)) for i in range(2)] + [Member(2, "waits")]
    error = ResourceError("device: cuda was asked for and no GPU was found")
    first, second, _ = members.all
    members.settle(CallEnd(CallInFlight(first, PREPARE), raised=error))
    assert (killed, members.n_given_up) == (["actor-0"], 1)
    with pytest.raises(ResourceError, match="no GPU was found"):
        members.settle(CallEnd(CallInFlight(second, PREPARE), raised=error))


def test_a_machines_processors_are_divided_anew_when_the_pool_changes(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pool_module, "Worker", bowl_worker(tmp_path))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    with Pool(cluster, WorkerSpec("m", "", "float32", "cpu", "l2"), n_workers=2, gpus_per_worker=0.0) as pool:
        until_idle(pool, 2)
        assert set(pool.map([Ask("threads")] * 6)) == {0}, "torch's own choice, as nobody asked"
    spec = WorkerSpec("m", "", "float32", "cpu", "l2", threads=1)
    with Pool(cluster, spec, n_workers=2, gpus_per_worker=0.0, divide_threads=True) as pool:
        until_idle(pool, 2)
        assert set(pool.map([Ask("threads")] * 6)) == {4}
        pool.resize(4)
        until_idle(pool, 4)
        assert set(pool.map([Ask("threads")] * 12)) == {2}
        pool.resize(1)
        assert pool.map([Ask("threads")]) == [8]


def test_a_range_takes_no_more_than_a_local_machine_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cluster(True, "local", 2, 4)
    assert fitting(WorkerRange(2, 64), machine, 0.5) == WorkerRange(2, 8)
    assert fitting(WorkerRange(1, 64), machine, 2.0) == WorkerRange(1, 2)
    with pytest.raises(ResourceError, match=r"3 worker\(s\) with 2 GPU each were asked for and this machine has 4"):
        fitting(WorkerRange(3, 64), machine, 2.0)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert fitting(WorkerRange(1, 64), machine, 0.0) == WorkerRange(1, 3)
    assert fitting(WorkerRange(5, 64), machine, 0.0) == WorkerRange(5, 5)
