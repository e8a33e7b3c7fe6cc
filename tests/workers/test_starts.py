"""Workers that end before they are ready: counted, said with Ray's reason, and given up where that goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import was_workers.members as members_module
import was_workers.pool as pool_module
from tests.places import ray_deaths
from was_search import __version__
from was_search.errors import ModelError, ResourceError, TransientError
from was_workers.calls_in_flight import PLACE, PREPARE, CallEnd, CallInFlight, CallsInFlight
from was_workers.cluster import connect
from was_workers.deaths import death_of
from was_workers.members import Members
from was_workers.pool import Pool
from was_workers.threads import ThreadShare
from was_workers.worker import Place, WorkerInfo, WorkerSpec


@pytest.mark.parametrize(
    ("error", "reason", "remedy", "again"),
    [
        (ray_deaths.short_of_memory(), "memory (6.52GB of 23.54GB used on 10.0.0.7)", "fewer --workers", False),
        (ray_deaths.killed(), "killed by a signal on 10.0.0.7", "dmesg", False),
        (ray_deaths.killed_at_start(), "killed by a signal on 10.0.0.7", "dmesg", False),
        (ray_deaths.exited(), "ended with status 3 on 10.0.0.7", "worker-*.err", False),
        (ray_deaths.not_imported(), "10.0.0.7 (ModuleNotFoundError: No module named 'torch')", "install", True),
        (ray_deaths.node_lost(), "its node is gone on 10.0.0.7", "ray status", False),
        (TransientError("GPU out of memory (x); use less\nmore"), "GPU out of memory (x); use less", "", False),
        (TimeoutError("no answer from worker-0"), "no answer from worker-0", "", False),
        (ray.exceptions.ObjectLostError("a" * 40, None, "b"), "ObjectLostError: ", "", False),
        (ray.exceptions.ActorDiedError(), "The actor died unexpectedly before finishing this task.", "", False),
    ],
)  # fmt: skip
def test_a_death_has_a_reason_and_what_may_help(error: Exception, reason: str, remedy: str, again: bool) -> None:
    death = death_of(error)
    assert reason in death.reason and remedy in death.remedy and death.again is again
    assert "\n" not in death.words and "\x1b" not in death.words
    assert len(death.words) < 500


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Members]:
    """``members(n)``: as many, whose actors do nothing; ``members.made`` are the numbers that got one."""
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: None)
    never = SimpleNamespace(remote=object)

    def actor(number: int) -> Any:
        make.made.append(number)
        return SimpleNamespace(place=never, prepare=never)

    def make(n: int) -> Members:
        made = Members(
            CallsInFlight(),
            actor,
            threads=ThreadShare(0, divided=False),
            goes=lambda node: False,
        )
        for _ in range(n):
            made.start()
        return made

    make.made = []
    return make


def end(members: Members, number: int, **how: Any) -> None:
    """End the call of a worker that is about to start."""
    (member,) = [each for each in members.all if each.index == number]
    members._calls.drop_all_of(member)
    members._recovering.clear()
    if member.actor is None:
        members._locate(member)
        members._calls.drop_all_of(member)
    members.settle(CallEnd(CallInFlight(member, how.pop("ticket", PREPARE)), **how))


@pytest.mark.parametrize("ticket", [PLACE, PREPARE])
def test_a_start_that_fails_again_and_again_is_given_up(members, caplog, ticket: int) -> None:
    found = members(1)
    for _ in range(4):
        end(found, 0, ticket=ticket, gone=ray_deaths.short_of_memory())
    assert not found.all
    assert members.made == [0, 0, 0, 0], "each start is a new process"
    assert [record.getMessage()[:60] for record in caplog.records[:4]] == [
        f"worker-0 failed before it was ready, {n} time(s) in a row: Ray" for n in (1, 2, 3, 4)
    ]
    assert "given up" in caplog.text
    assert found.all_lost.startswith(
        "no worker could be started: 4 process(es) failed before they were ready; the last: "
    )
    assert "short of memory (6.52GB of 23.54GB used on 10.0.0.7); fewer --workers" in found.all_lost


def test_two_are_enough_where_each_takes_long(members) -> None:
    found = members(1)
    end(found, 0, gone=ray_deaths.killed())
    found.all[0].began -= members_module._STARTS_SECONDS
    end(found, 0, gone=ray_deaths.killed())
    assert not found.all


def test_nodes_that_go_while_a_large_model_loads_are_not_held_against_it(members) -> None:
    found = members(1)
    found.all[0].began -= members_module._STARTS_SECONDS
    for _ in range(8):
        end(found, 0, gone=ray_deaths.node_lost())
    assert found.all
    end(found, 0, gone=ray_deaths.node_lost())
    assert not found.all and "its node is gone on 10.0.0.7; look at that machine" in found.all_lost


def test_a_gpu_that_is_too_small_is_found_out_in_the_same_way(members, caplog) -> None:
    """The error is one that may pass, raised by the load itself; it was retried silently for minutes."""
    found = members(1)
    for _ in range(4):
        end(found, 0, raised=TransientError("GPU out of memory (x); use fewer workers a GPU"))
    assert not found.all and "fewer workers a GPU" in found.all_lost
    assert caplog.text.count("failed before it was ready") == 4


def test_a_worker_that_was_ready_once_has_more_patience(members, caplog) -> None:
    found = members(1)
    end(found, 0, value=WorkerInfo("h", 1, "cpu", None, __version__, 0.0))
    end(found, 0, ticket=7, gone=ray_deaths.killed())
    assert "failed before it was ready" not in caplog.text, "it was ready"
    for _ in range(7):
        end(found, 0, gone=ray_deaths.killed())
    assert found.all
    end(found, 0, gone=ray_deaths.killed())
    assert not found.all
    assert found.all_lost.startswith("every worker was lost and could not be restarted: 8 process(es)")


def test_code_that_cannot_be_imported_is_not_tried_again(members, caplog) -> None:
    with pytest.raises(
        ResourceError, match=r"worker-0 cannot be started: its code cannot be imported .*'torch'\); install"
    ):
        end(members(1), 0, ticket=PLACE, gone=ray_deaths.not_imported())
    found = members(2)
    found.all[1].place = Place("other", "h", 1)
    end(found, 0, ticket=PLACE, gone=ray_deaths.not_imported())
    assert [member.index for member in found.all] == [1], "another node may have what this one lacks"
    assert "worker-0 cannot load the model and is let go: ray: worker-0 cannot be started" in caplog.text


def test_others_go_on_where_one_cannot_start(members, caplog) -> None:
    found = members(2)
    end(found, 0, value=WorkerInfo("h", 1, "cpu", None, __version__, 0.0))
    for _ in range(4):
        end(found, 1, gone=ray_deaths.short_of_memory())
    assert [member.index for member in found.all] == [0] and found.n_given_up == 1
    assert "worker-1 is given up for 600 s: Ray ended it because its node is short of memory" in caplog.text


@pytest.mark.ray
@pytest.mark.own_ray
@pytest.mark.slow
def test_a_machine_that_is_short_of_memory(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Ray kills whatever begins; before, without a word, for an hour."""

    class Sleeper:  # local, so that Ray ships it by value
        def __init__(self, spec: WorkerSpec, number: int) -> None:
            pass

        def place(self) -> Place:
            return Place("node", "host", os.getpid())

        def prepare(self) -> None:
            time.sleep(600)

    monkeypatch.setattr(pool_module, "Worker", Sleeper)
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "250")
    spec = WorkerSpec("m", "", "float32", "cpu", "l2")
    words = r"4 process.*short of memory \(.*GB used on .*\); fewer --workers"
    with (
        connect("local", workers=1) as cluster,
        Pool(cluster, spec, n_workers=1, gpus_per_worker=0.0) as pool,
        pytest.raises(ResourceError, match=words),
    ):
        pool.wait_idle(300)
    assert caplog.text.count("failed before it was ready") == 4


def test_a_model_that_cannot_be_read_is_said_at_once(members) -> None:
    with pytest.raises(ModelError, match="not a checkpoint"):
        end(members(1), 0, raised=ModelError("not a checkpoint"))
