"""Whose fault a lost call is: a sick worker must not use up a call's attempts, nor a bad call go round for ever."""

from __future__ import annotations

from collections import deque

import pytest

from benchmarks.harness.pool_double import PoolDouble
from was_search.coordinator.calls import Work
from was_search.coordinator.contracts import Outcome
from was_search.coordinator.health import QuarantinePolicy
from was_search.coordinator.lost_calls import LostCalls


def pool_of(n: int, *, failures: int = 3) -> PoolDouble:
    return PoolDouble(n_workers=n, policy=QuarantinePolicy(failures=failures))


def lost(losses: LostCalls, call: int, worker: int, *, blameless: bool = False) -> bool:
    error = ConnectionError("it died")
    return losses.lost(call, Outcome(0, "w", error=error, lost=True, blameless=blameless, index=worker), "it died")


def test_a_call_that_three_workers_lost_is_given_up() -> None:
    losses = LostCalls(pool_of(64), 3)
    assert [lost(losses, 0, worker) for worker in (5, 9, 11)] == [False, False, True]
    assert losses.count(0) == 3


def test_one_worker_may_lose_the_same_call_three_times_and_others_get_it() -> None:
    """It is in quarantine then, and what it has lost does not count any more."""
    pool = pool_of(4)
    losses = LostCalls(pool, 3)
    assert [lost(losses, 0, 1) for _ in range(3)] == [False] * 3
    assert 1 not in pool.proven
    assert losses.count(0) == 0
    assert [lost(losses, 0, worker) for worker in (0, 2)] == [False, False]


def test_several_sick_workers_do_not_use_up_a_calls_attempts() -> None:
    """Each loses its own call first; only that one counts. By their third losses they are in quarantine."""
    pool = pool_of(64)
    losses = LostCalls(pool, 3)
    for turn in range(3):
        for worker in range(3):
            assert not lost(losses, (worker + turn) % 3, worker)
    assert pool.proven == frozenset(range(3, 64))
    assert [losses.count(call) for call in range(3)] == [0, 0, 0]


def test_of_two_workers_both_must_have_lost_a_call_and_three_times_together() -> None:
    losses = LostCalls(pool_of(2, failures=0), 3)
    assert [lost(losses, 0, worker) for worker in (0, 0, 0, 0)] == [False] * 4
    assert lost(losses, 0, 1)


def test_the_only_worker_has_as_many_attempts() -> None:
    losses = LostCalls(pool_of(1), 3)
    assert [lost(losses, 0, 0) for _ in range(3)] == [False, False, True]


def test_a_worker_that_loses_everything_alone_ends_it() -> None:
    """Calls in turn: none may go round for ever because only the worker is suspected."""
    losses = LostCalls(pool_of(1), 3)
    ended = [lost(losses, number % 4, 0) for number in range(24)]
    assert True in ended


def test_a_call_goes_to_a_waiting_worker_that_never_helps_no_more_than_nine_times() -> None:
    """The other worker has held the model, and waits for a place since."""
    losses = LostCalls(pool_of(2, failures=0), 3)
    assert [lost(losses, 0, 0) for _ in range(9)] == [False] * 8 + [True]


def test_what_is_lost_without_blame_does_not_count() -> None:
    pool = pool_of(1)
    losses = LostCalls(pool, 3)
    assert not any(lost(losses, 0, 0, blameless=True) for _ in range(50))
    assert losses.count(0) == 0


def test_an_answer_between_two_losses_takes_the_suspicion_away() -> None:
    pool = pool_of(3)
    losses = LostCalls(pool, 3)
    for call in range(6):
        assert not lost(losses, call, 0)
        pool.health.answered(0, 1.0, Work("shard"))
    assert pool.proven == {0, 1, 2}
    assert all(losses.count(call) == 1 for call in range(6))


@pytest.mark.parametrize(("worker", "first"), [(0, 4), (1, 7), (2, 7)])
def test_a_worker_gets_first_what_it_has_not_lost(worker: int, first: int) -> None:
    losses = LostCalls(pool_of(3), 3)
    lost(losses, 7, 0)
    waiting = deque([7, 4])
    assert losses.next_for(worker, waiting) == first
    assert list(waiting) == [call for call in (7, 4) if call != first]


def test_a_worker_that_has_lost_all_of_them_gets_the_first() -> None:
    losses = LostCalls(pool_of(3), 3)
    lost(losses, 7, 0), lost(losses, 4, 0)
    lost(losses, 4, 0)
    waiting = deque([7])
    assert losses.next_for(0, waiting) == 7
    assert not waiting
