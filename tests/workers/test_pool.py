"""The pool on a real local Ray, with workers that do as they are told instead of holding a model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import was_workers.pool as pool_module
from was_search import __version__
from was_search.errors import DeviceLostError, InfeasibleError, ModelError, ResourceError, TransientError
from was_workers.cluster import Cluster, connect
from was_workers.pool import Pool
from was_workers.worker import WorkerInfo, WorkerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
            def __init__(self, spec: WorkerSpec) -> None:
                self.spec = spec

            def prepare(self) -> Any:
                marker = tmp_path / "first"
                try:
                    marker.touch(exist_ok=False)
                except FileExistsError:
                    if failing == "second":
                        time.sleep(1.0)
                        raise ModelError("no such folder on this node") from None
                if failing == "all":
                    raise ModelError("not a checkpoint")
                version = "0.0.1" if failing == "version" else __version__
                return WorkerInfo("host", os.getpid(), "cpu", None, version, 0.0)

            def echo(self, value: Any) -> Any:
                return value, os.getpid()

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
    end = time.monotonic() + 60
    while pool.n_idle < 2:
        assert time.monotonic() < end
        pool.wait(0.2)
    return {pid for _, pid in pool.map([("echo", i) for i in range(12)])}


def test_map_keeps_the_order_of_its_calls(pool) -> None:
    found = pool().map([("echo", i) for i in range(7)])
    assert [value for value, _ in found] == list(range(7))


def test_an_error_of_the_call_itself_is_raised(pool) -> None:
    with pytest.raises(InfeasibleError, match="not finite"):
        pool().map([("fail", InfeasibleError("scores are not finite"))])


@pytest.mark.parametrize("how", ["kill", "hang", "device", "memory"])
def test_a_lost_call_is_repeated(pool, tmp_path: Path, how: str) -> None:
    opened = pool()
    before = both(opened)
    deadline = 3.0 if how == "hang" else 60.0
    (pid,) = opened.map([("once", tmp_path / how, how)], deadline_seconds=deadline)
    assert pid > 0
    after = both(opened)
    # out of memory leaves the process, the others replace it
    assert (after <= before) == (how == "memory")


def test_a_model_that_no_worker_can_load_is_an_error(pool) -> None:
    with pytest.raises(ModelError, match="not a checkpoint"):
        pool(failing="all").wait_idle(60)


def test_one_node_that_lacks_the_model_is_let_go(pool) -> None:
    opened = pool(failing="second")
    assert len(opened.map([("echo", i) for i in range(30)])) == 30
    end = time.monotonic() + 30
    while opened.n_workers == 2 and time.monotonic() < end:
        opened.wait(0.2)
    assert opened.n_workers == 1
    assert len(opened.map([("echo", 1)])) == 1


def test_calls_left_over_by_an_error_do_not_disturb_the_next_map(pool) -> None:
    opened = pool()
    with pytest.raises(InfeasibleError):
        opened.map([("fail", InfeasibleError("no")), ("echo", 1), ("echo", 2)])
    assert [value for value, _ in opened.map([("echo", i) for i in range(5)])] == list(range(5))


def test_more_gpus_than_the_machine_has(cluster: Cluster) -> None:
    spec = WorkerSpec("m", "", "float32", "cuda", "l2")
    with pytest.raises(ResourceError, match=r"2 worker\(s\) with 0.5 GPU each were asked for and this machine has 0"):
        Pool(Cluster(True, "local", 2, 0), spec, n_workers=2, gpus_per_worker=0.5)


def test_a_worker_of_another_version_is_refused_with_both_named(pool) -> None:
    with pytest.raises(ResourceError, match=rf"runs was-search 0\.0\.1 and the coordinator {__version__}; install"):
        pool(failing="version").wait_idle(60)
