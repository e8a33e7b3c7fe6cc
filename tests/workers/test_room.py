"""A cluster without room for the workers: said at once and again, and ended where nothing can change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray

import was_workers.room as room_module
from tests.places.ray_clusters import nodes
from was_search.errors import ResourceError
from was_search.studies.worker_range import WorkerRange
from was_workers.room import RoomWatch, capacity


class Waiting:
    """A watch over workers of whom ``placed`` have a place, and the others wait from the start."""

    def __init__(self, asked: str, *, gpus: float = 0.0, placed: int = 0, starting: bool = True) -> None:
        self.seconds = 0.0
        self.placed = placed
        self._asked = WorkerRange.parse(asked)
        self._starting = starting
        self._watch = RoomWatch(gpus, clock=lambda: 1000.0 + self.seconds)

    def until(self, seconds: float) -> None:
        """Look twice a second until then, as the pool does."""
        while self.seconds < seconds:
            self.seconds += 0.5
            self._watch.look(self._asked, self.placed, self.seconds, starting=self._starting)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``cluster(*nodes, free=(cpus, gpus), grows=False)`` makes one; as often as its nodes change."""

    def make(*found: dict[str, Any], free: tuple[float, float] = (0.0, 0.0), grows: bool = False) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: list(found))
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free[0], "GPU": free[1]})
        monkeypatch.setattr(room_module, "may_grow", lambda: grows)

    return make


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_a_start_that_cannot_find_room_ends_within_a_minute(cluster, caplog) -> None:
    """Before, it went on for an hour."""
    cluster(*nodes((8, 0), (16, 2), (8, 0)), free=(30.0, 1.5))
    waiting = Waiting("4", gpus=4.0)
    waiting.until(5)
    (line,) = lines(caplog)
    assert line == (
        "no worker has a place yet: 4 worker(s) were asked for, each needs 1 CPU and 4 GPU, and no node has that "
        "(nodes: 1 of 16 CPU and 2 GPU, 2 of 8 CPU and 0 GPU; free: 30 CPU and 1.5 GPU); waiting for room, 'ray "
        "status' shows demand; start nodes with 'ray start --address=...', or lower --gpus-per-worker"
    )
    with pytest.raises(ResourceError) as error:
        waiting.until(600)
    assert 40 < waiting.seconds < 60
    assert [line.split(":")[0] for line in lines(caplog)] == ["no worker has a place after 34 s"]
    assert str(error.value).startswith("ray: the cluster cannot hold 1 worker(s) of 1 CPU and 4 GPU each: no node has")
    assert "it has no autoscaler, and no node came within 45 s; start nodes with 'ray start" in str(error.value)
    assert str(error.value).endswith("before the run, lower --gpus-per-worker or use --device cpu")


def test_a_lack_of_cpus_is_not_to_be_mended_by_fewer_gpus(cluster, caplog) -> None:
    cluster(*nodes((0, 0)))
    with pytest.raises(ResourceError, match=r"of 1 CPU each: no node has that .*before the run$"):
        Waiting("1").until(600)
    assert "gpus-per-worker" not in "".join(lines(caplog))


def test_a_range_whose_minimum_never_fits_ends_too(cluster, caplog) -> None:
    """One worker has a place and loads its model; the second that is needed never gets one."""
    cluster(*nodes((1, 0)))
    with pytest.raises(ResourceError, match=r"cannot hold 2 worker.*have room for 1 .*before the run, or lower --work"):
        Waiting("2:4", placed=1).until(600)
    assert lines(caplog)[0].startswith("1 of at least 2 workers have a place yet: 2:4 worker(s) were asked for")


@pytest.mark.parametrize("case", ["autoscaler", "taken", "running"])
def test_room_that_may_come_is_waited_for_and_that_is_said_every_half_minute(cluster, caplog, case: str) -> None:
    if case == "taken":
        cluster(*nodes((8, 4)))
    else:
        cluster(*nodes((0, 0)), grows=case == "autoscaler")
    Waiting("2", gpus=0.5, starting=case != "running").until(300)
    found = lines(caplog)
    assert len(found) == 10 and found[0].startswith("no worker has a place yet: 2 worker(s)")
    assert found[1].startswith(
        "no worker has a place after 45 s" if case == "taken" else "no worker has a place after 34"
    )
    if case == "taken":
        assert "all nodes together have room for 8 (nodes: 1 of 8 CPU and 4 GPU; free: 0 CPU and 0 GPU)" in found[0]
        assert "end what else runs there, or start nodes" in found[0]


def test_nodes_that_come_one_after_another_are_waited_for(cluster) -> None:
    waiting = Waiting("4:8", gpus=1.0)
    for n in range(4):
        cluster(*nodes(*[(8, 1)] * n))
        waiting.until(30 * (n + 1))
    with pytest.raises(ResourceError, match="cannot hold 4"):
        waiting.until(600)
    assert 90 + 40 < waiting.seconds < 90 + 60


def test_a_process_that_is_slow_to_start_is_no_lack_of_room(cluster, caplog) -> None:
    cluster(*nodes((8, 0)))
    Waiting("1").until(14)
    waiting = Waiting("2", placed=1, starting=False)
    waiting.until(14)
    waiting.placed = 2
    waiting.until(100)
    assert not lines(caplog)


def test_a_fixed_number_that_finds_less_room_goes_on_and_says_so_once(cluster, caplog, monkeypatch) -> None:
    """Before, three of four workers waited in silence until the run was over."""
    cluster(*nodes((1, 0)))
    waiting = Waiting("4", placed=1)
    waiting.until(5)
    (line,) = lines(caplog)
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("the cluster is asked for nothing"))
    waiting.until(300)
    assert not lines(caplog)
    assert line.startswith(
        "1 of 4 worker(s) have a place and do the work; 4 worker(s) were asked for, each needs 1 CPU, and all nodes "
        "together have room for 1 (nodes: 1 of 1 CPU and 0 GPU; free: 0 CPU and 0 GPU)"
    )


def test_a_range_that_has_its_minimum_is_content(cluster, caplog) -> None:
    cluster(*nodes((2, 0)))
    Waiting("2:64", placed=2).until(300)
    assert not lines(caplog)


@pytest.mark.parametrize(
    ("found", "gpus", "workers"),
    [
        ([(8, 4)], 1.0, 4),
        ([(2, 4)], 1.0, 2),
        ([(8, 4)], 0.5, 8),
        ([(8, 2)], 0.4, 4),
        ([(8, 3), (8, 3)], 2.0, 2),
        ([(8, 0), (0.5, 0)], 0.0, 8),
        ([], 0.0, 0),
    ],
)
def test_how_many_workers_nodes_hold(found: list[tuple[float, float]], gpus: float, workers: int) -> None:
    assert capacity(found, gpus) == workers


def test_nodes_that_are_gone_hold_none(cluster) -> None:
    cluster({**nodes((8, 8))[0], "Alive": False})
    assert room_module.node_sizes() == []
