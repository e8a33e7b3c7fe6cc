"""The rules of ``WorkerPool``, for any pool of two workers: a class of tests, and the calls that they use."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from was_search.coordinator.calls import Call, Shared, Work
from was_search.coordinator.contracts import Outcome, WorkerPool
from was_search.errors import DataError
from was_search.studies.worker_range import WorkerRange

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes of a cluster have no tests

PATIENCE = 120.0
"""Seconds that no rule needs, on however busy a machine."""


@dataclass(frozen=True)
class Give(Call[Any]):
    """Returns its value."""

    value: Any
    name = words = "give"

    def run(self, model: Any) -> Any:
        return self.value.value if hasattr(self.value, "value") else self.value


@dataclass(frozen=True)
class Refuse(Call[Any]):
    """Raises what can be no fault of its worker."""

    name = words = "refuse"

    def run(self, model: Any) -> Any:
        raise DataError("there is no such text")


@dataclass(frozen=True)
class Die(Call[Any]):
    """Ends its worker's process."""

    name = words = "die"

    def run(self, model: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Hold(Call[Any]):
    """Ends once ``path`` is gone."""

    path: Path
    name = words = "hold"

    @property
    def held(self) -> bool:
        return self.path.exists()

    def run(self, model: Any) -> str:
        while self.held:
            time.sleep(0.02)
        return "held"


def ended(pool: WorkerPool, n: int) -> list[Outcome]:
    """The next ``n`` calls that end."""
    outcomes: list[Outcome] = []
    until(pool, lambda: len(outcomes) >= n, outcomes)
    assert len(outcomes) == n
    return outcomes


def until(pool: WorkerPool, condition: Callable[[], bool], outcomes: list[Outcome] | None = None) -> None:
    """Wait for the pool until the condition holds; what ends meanwhile goes into ``outcomes``."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, pool.state
        found = pool.wait(0.1)
        if outcomes is None:
            assert not found
        else:
            outcomes += found


def settled(pool: WorkerPool) -> bool:
    """Whether there are two idle workers and no others."""
    return pool.n_idle == pool.state.ready == sum(pool.state.counts.values()) == 2


class PoolRules:
    """To be inherited with a fixture ``pool``: two idle workers, of a policy that puts none of them in quarantine."""

    @pytest.fixture
    def hold(self, tmp_path: Path) -> Hold:
        path = tmp_path / "held"
        path.touch()
        return Hold(path)

    def test_it_has_what_the_contract_names(self, pool: WorkerPool) -> None:
        for name, member in vars(WorkerPool).items():
            if name.startswith("_"):
                continue
            assert hasattr(pool, name)
            if inspect.isfunction(member):
                asked = list(inspect.signature(member).parameters)[1:]
                given = inspect.signature(getattr(pool, name)).parameters
                assert [each for each in given if each in asked] == asked

    def test_calls_go_to_idle_workers_in_the_order_of_their_names(self, pool: WorkerPool) -> None:
        names = pool.idle_names
        assert len(set(names)) == pool.n_idle == 2
        submitted = {}
        for n in (1, 0):
            assert pool.next_idle == pool.idle_names[0]
            worker = pool.next_idle, pool.next_index
            submitted[pool.submit(Give(n))] = (*worker, n)
            assert pool.n_idle == len(pool.idle_names) == n
        assert [worker for worker, _, _ in submitted.values()] == names
        outcomes = ended(pool, 2)
        assert {o.ticket: (o.worker, o.index, o.value) for o in outcomes} == submitted
        assert not any(o.error or o.lost for o in outcomes)
        assert all(o.seconds >= 0.0 for o in outcomes)
        assert sorted(pool.idle_names) == sorted(names), "a worker whose call has ended is idle"
        assert pool.proven == {index for _, index, _ in submitted.values()}

    def test_nothing_in_flight_ends(self, pool: WorkerPool) -> None:
        assert pool.wait(0.0) == pool.wait(0.1) == []

    def test_an_error_of_the_call_is_no_loss(self, pool: WorkerPool) -> None:
        ticket = pool.submit(Refuse())
        (outcome,) = ended(pool, 1)
        assert outcome.ticket == ticket
        assert isinstance(outcome.error, DataError)
        assert not outcome.lost
        assert pool.n_idle == 2, "its worker is idle at once"

    def test_a_worker_that_dies_loses_its_call_and_comes_back(self, pool: WorkerPool) -> None:
        index, ticket = pool.next_index, pool.submit(Die())
        (outcome,) = ended(pool, 1)
        assert (outcome.ticket, outcome.index) == (ticket, index)
        assert outcome.lost
        assert not outcome.blameless
        assert outcome.error is not None
        until(pool, lambda: settled(pool))
        assert index in pool.proven

    def test_a_call_in_flight_is_shown_and_may_be_given_up(self, pool: WorkerPool, hold: Hold) -> None:
        index, ticket = pool.next_index, pool.submit(hold)
        time.sleep(0.05)
        assert pool.wait(0.0) == []
        ((shown, worker, seconds),) = pool.running
        assert (shown, worker) == (ticket, index)
        assert 0.05 <= seconds < PATIENCE
        pool.give_up(ticket, "which takes too long")
        (outcome,) = ended(pool, 1)
        assert (outcome.ticket, outcome.lost, outcome.blameless) == (ticket, True, False)
        assert "which takes too long" in str(outcome.error)
        assert pool.running == []
        until(pool, lambda: settled(pool))

    def test_a_call_is_lost_at_its_deadline(self, pool: WorkerPool, hold: Hold) -> None:
        ticket = pool.submit(hold, deadline_seconds=0.3)
        (outcome,) = ended(pool, 1)
        assert (outcome.ticket, outcome.lost, outcome.blameless) == (ticket, True, False)
        assert outcome.seconds >= 0.3
        until(pool, lambda: settled(pool))

    def test_a_reply_that_is_there_when_the_pool_looks_is_taken_whatever_the_deadline(self, pool: WorkerPool) -> None:
        """Whoever waits for a database does not look; the deadline is for calls that hang."""
        ticket = pool.submit(Give(1), deadline_seconds=0.2)
        self.reply_is_there(pool)
        time.sleep(0.3)
        (outcome,) = pool.wait(0.0)
        assert (outcome.ticket, outcome.value, outcome.lost) == (ticket, 1, False)
        assert pool.n_idle == 2

    def reply_is_there(self, pool: WorkerPool) -> None:
        """Wait until the call in flight has ended, without looking as the pool does."""

    def test_abandoned_calls_never_come_back(self, pool: WorkerPool, hold: Hold) -> None:
        tickets = {pool.submit(hold), pool.submit(hold)}
        pool.abandon()
        assert pool.running == []
        hold.path.unlink()
        until(pool, lambda: settled(pool))
        assert pool.submit(Give(1)) not in tickets
        assert [outcome.value for outcome in ended(pool, 1)] == [1]

    def test_quarantine_takes_a_worker_off_its_call_for_a_while(self, pool: WorkerPool, hold: Hold) -> None:
        index, ticket = pool.next_index, pool.submit(hold)
        assert pool.quarantine(index, "it is slow", 0.5)
        (outcome,) = ended(pool, 1)
        assert (outcome.ticket, outcome.index, outcome.lost, outcome.blameless) == (ticket, index, True, True)
        assert not pool.quarantine(pool.next_index, "it is slow too", 0.5), "the last one stays"
        assert pool.n_idle == 1
        hold.path.unlink()
        until(pool, lambda: settled(pool))
        assert len(pool.proven) == 2

    def test_whom_the_pool_does_not_know_is_not_put_in_quarantine(self, pool: WorkerPool) -> None:
        assert not pool.quarantine(999, "it is slow", 60.0)
        assert pool.state.quarantined == ()

    def test_idle_workers_in_quarantine_get_nothing(self, pool: WorkerPool) -> None:
        index, name = pool.next_index, pool.next_idle
        assert pool.quarantine(index, "it is slow", 1.0)
        assert name not in pool.idle_names
        assert index not in pool.proven
        assert [(each.worker, each.reason) for each in pool.state.quarantined] == [(name, "it is slow")]
        assert pool.state.ready == 1
        until(pool, lambda: settled(pool))

    def test_a_pool_grows_and_shrinks_and_loses_no_call(self, pool: WorkerPool, hold: Hold) -> None:
        pool.resize(WorkerRange(3, 3))
        until(pool, lambda: pool.n_idle == 3)
        assert (pool.state.asked, pool.state.ready, pool.n_loaded, pool.n_parallel) == ("3", 3, 3, 3)
        tickets = [pool.submit(hold) for _ in range(3)]
        pool.resize(WorkerRange(2, 2))
        assert pool.state.ready + pool.state.draining == 3
        assert len(pool.running) == 3
        hold.path.unlink()
        outcomes = ended(pool, 3)
        assert sorted(outcome.ticket for outcome in outcomes) == tickets
        assert [outcome.value for outcome in outcomes] == ["held"] * 3
        until(pool, lambda: settled(pool))
        assert pool.n_loaded == 2
        assert pool.state.asked == "2"

    def test_a_fixed_size_stays_however_few_are_needed(self, pool: WorkerPool) -> None:
        pool.need(1)
        assert pool.wait(0.1) == []
        assert pool.n_idle == pool.state.ready == pool.n_loaded == 2

    def test_calls_get_what_they_share(self, pool: WorkerPool) -> None:
        shared: Shared[list[int]] = pool.share([1, 2, 3])
        assert shared.value == [1, 2, 3]
        pool.submit(Give(shared)), pool.submit(Give(shared))
        assert [outcome.value for outcome in ended(pool, 2)] == [[1, 2, 3]] * 2

    def test_map_keeps_the_order_of_its_calls(self, pool: WorkerPool) -> None:
        done: list[int] = []
        found = pool.map([Give(n) for n in range(7)], phase="giving", done=lambda: done.append(1))
        assert found == list(range(7))
        assert len(done) == 7

    def test_health_is_of_these_workers(self, pool: WorkerPool) -> None:
        assert pool.health.patience(Work("a call of a kind not seen")) == 86400.0
        assert pool.gpus_per_worker == 0.0
