"""Whose calls are slow or lost, and which hang: the rules on numbers alone."""

from __future__ import annotations

import random
from statistics import median

import pytest

from benchmarks.harness.pool_double import PoolDouble
from was_search.coordinator import health as health_module
from was_search.coordinator.calls import Work
from was_search.coordinator.health import Health, QuarantinePolicy

EVALUATION = Work("an evaluation")


class Workers(PoolDouble):
    """Its calls in flight are those that it is told."""

    running = ()  # type: ignore[assignment]

    def __init__(self, n: int) -> None:
        super().__init__(n_workers=n)


def evaluated(health: Health, paces: dict[int, float], times: int = 3, tokens: int = 100) -> None:
    for _ in range(times):
        for worker, seconds in paces.items():
            health.answered(worker, seconds, Work("an evaluation", tokens))


@pytest.mark.parametrize("n_workers", range(1, 8))
def test_what_is_kept_ready_of_all_paces_is_what_they_say_one_by_one(n_workers: int) -> None:
    """Among equal paces too; and a new call or a worker that has gone counts at once."""
    rng = random.Random(n_workers)
    paces = health_module._Paces()
    recent: dict[int, list[float]] = {}
    for _ in range(60):
        worker, seconds = rng.randrange(n_workers), float(rng.choice([1, 2, 2, 3]) + rng.choice([0, 0.25]))
        if rng.random() < 0.1:
            paces.forget(worker)
            recent.pop(worker, None)
        else:
            paces.add(worker, seconds, 1.0)
            recent[worker] = [*recent.get(worker, []), seconds][-5:]
        assert paces.slowest_seconds(2.0) == (2.0 * max(max(r) for r in recent.values()) if recent else None)
        for own in range(n_workers + 1):
            others = [median(r) for other, r in recent.items() if other != own]
            assert paces.usual_seconds(own, 2.0) == (2.0 * median(others) if others else None)


def test_a_worker_far_behind_its_peers_is_slow() -> None:
    workers = Workers(4)
    evaluated(Health(workers, QuarantinePolicy()), {0: 1.0, 1: 1.2, 2: 3.9, 3: 4.9})
    assert workers.put == [(3, "slow, 4.1 times its peers' seconds a token", 600.0)]


def test_a_worker_is_measured_by_tokens_and_not_by_seconds() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy())
    for _ in range(5):
        health.answered(0, 10.0, Work("an evaluation", 1000))
        health.answered(1, 1.0, Work("an evaluation", 100))
    assert workers.put == []


def test_one_long_evaluation_is_forgiven() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy())
    evaluated(health, {0: 1.0, 1: 1.0}, 4)
    health.answered(1, 60.0, Work("an evaluation", 100))
    evaluated(health, {0: 1.0, 1: 1.0}, 4)
    assert workers.put == []


def test_calls_lost_in_a_row_count_and_one_success_forgives_them() -> None:
    workers = Workers(3)
    health = Health(workers, QuarantinePolicy())
    for _ in range(3):
        health.lost(0, "GPU out of memory")
        health.lost(0, "GPU out of memory")
        health.answered(0, 1.0, Work("an evaluation", 100))
    assert workers.put == []
    for _ in range(3):
        health.lost(1, "it died")
    assert workers.put == [(1, "3 calls in a row were lost; the last: it died", 600.0)]


def test_the_last_worker_is_left_alone() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy(failures=1))
    health.lost(0, "it died")
    health.lost(1, "it died")
    assert [index for index, *_ in workers.put] == [0]


def test_each_further_time_is_twice_as_long_up_to_a_limit() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy(failures=1, seconds=10.0))
    for _ in range(7):
        health.lost(0, "it died")
        workers.release(0)
    assert [seconds for _, _, seconds in workers.put] == [10.0, 20.0, 40.0, 80.0, 160.0, 160.0, 160.0]


def test_a_call_in_flight_is_overdue_by_its_peers_pace() -> None:
    workers = Workers(3)
    health = Health(workers, QuarantinePolicy(slowdown=2.0))
    workers.running = [(7, 2, 3600.0)]
    health.look({7: EVALUATION})
    assert workers.put == [], "nothing is known of its peers"
    evaluated(health, {0: 4.0, 1: 4.0})
    workers.running = [(7, 2, 23.9), (8, 2, 3600.0)]
    health.look({7: EVALUATION})
    assert workers.put == [], "24 s are three times as long as what is slow; ticket 8 is no evaluation"
    workers.running = [(7, 2, 24.1)]
    health.look({7: EVALUATION})
    assert workers.put == [(2, "slow, at an evaluation for 24 s, 6 times what its peers take", 600.0)]


def test_calls_of_another_kind_say_nothing_of_a_pace() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy())
    for _ in range(4):
        health.answered(0, 1.0, Work("a calibration pass", 100))
        health.answered(1, 9.0, Work("a descent", 100))
    assert workers.put == []
    for _ in range(3):
        health.answered(1, 9.0, Work("a calibration pass", 100))
    assert workers.put == [(1, "slow, 9.0 times its peers' seconds a token", 600.0)]


def test_milliseconds_make_nobody_slow() -> None:
    """Calls of milliseconds take several times as long on a machine that is busy with something else."""
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy())
    evaluated(health, {0: 0.01, 1: 0.9})
    assert workers.put == []
    evaluated(health, {0: 0.01, 1: 1.1}, 5)
    assert [index for index, *_ in workers.put] == [1]


def test_a_processs_first_call_may_take_as_long_as_its_peers_first_ones() -> None:
    """They compiled their kernels too, and have forgotten it by their fourth call."""
    workers = Workers(3)
    health = Health(workers, QuarantinePolicy(slowdown=2.0))
    evaluated(health, {0: 40.0, 1: 40.0}, 1)
    evaluated(health, {0: 1.0, 1: 1.0}, 4)
    workers.running = [(7, 2, 119.0), (8, 1, 5.9)]
    health.look({7: Work("an evaluation", 100), 8: Work("an evaluation", 100)})
    assert workers.put == []
    workers.running = [(8, 1, 60.0)]
    health.look({8: Work("an evaluation", 100)})
    assert [index for index, *_ in workers.put] == [1], "it has had its first call"
    workers.running = [(7, 2, 121.0)]
    health.look({7: Work("an evaluation", 100)})
    assert [index for index, *_ in workers.put] == [1, 2]


def test_the_tokens_of_a_call_in_flight_count() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy(slowdown=2.0))
    evaluated(health, {0: 10.0}, tokens=100)
    workers.running = [(7, 1, 590.0)]
    health.look({7: Work("an evaluation", 1000)})
    assert workers.put == []
    health.look({7: Work("an evaluation", 900)})
    assert [index for index, *_ in workers.put] == [1]


def test_a_loss_is_suspicious_from_the_second_in_a_row_until_nothing_comes_of_it() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy(failures=3))
    assert [health.lost(0, "it died") for _ in range(3)] == [False, True, True]
    assert [health.lost(1, "it died") for _ in range(3)] == [False, True, False], "the last one stays"


def test_a_short_call_is_never_overdue() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy())
    evaluated(health, {0: 0.01})
    workers.running = [(1, 1, 9.0)]
    health.look({1: EVALUATION})
    assert workers.put == []


def test_zero_is_never() -> None:
    workers = Workers(3)
    health = Health(workers, QuarantinePolicy(slowdown=0.0, failures=0))
    evaluated(health, {0: 1.0, 1: 1.0, 2: 100.0})
    workers.running = [(1, 2, 1e6)]
    health.look({1: EVALUATION})
    for _ in range(9):
        health.lost(1, "it died")
    assert workers.put == []


DAY = 86400.0


def test_patience_is_twenty_times_the_slowest_by_tokens() -> None:
    health = Health(Workers(1), QuarantinePolicy())
    for seconds, tokens in [(20.0, 1000), (60.0, 2000), (50.0, 1000)]:
        health.answered(0, seconds, Work("an evaluation", tokens))
    assert health.patience(Work("an evaluation", 1000)) == pytest.approx(20 * 50.0)
    assert health.patience(Work("an evaluation", 400)) == pytest.approx(20 * 20.0)
    assert health.patience(EVALUATION) == pytest.approx(20 * 100.0), "as the longest one seen, at the slowest pace"


def test_patience_is_five_minutes_at_least_and_a_day_at_most() -> None:
    health = Health(Workers(1), QuarantinePolicy())
    health.answered(0, 0.1, Work("an evaluation", 100))
    assert health.patience(EVALUATION) == 300.0
    health.answered(0, 5000.0, Work("an evaluation", 100))
    assert health.patience(EVALUATION) == DAY


def test_patience_knows_only_what_was_seen_of_the_kind() -> None:
    """A first call compiles and loads: nothing else tells how long that takes."""
    health = Health(Workers(2), QuarantinePolicy())
    health.answered(0, 1.0, Work("a calibration pass", 100))
    health.answered(0, 1.0, Work("an evaluation"))  # its tokens are not known
    assert health.patience(Work("an evaluation", 100)) == DAY


def test_patience_forgets_what_was_slow_long_ago() -> None:
    health = Health(Workers(1), QuarantinePolicy())
    health.answered(0, 600.0, Work("an evaluation", 100))
    evaluated(health, {0: 30.0}, 4)
    assert health.patience(EVALUATION) == pytest.approx(20 * 600.0)
    evaluated(health, {0: 30.0}, 1)
    assert health.patience(EVALUATION) == pytest.approx(20 * 30.0)


@pytest.mark.parametrize("slowdown", [4.0, 0.0])
def test_a_lone_call_that_hangs_is_given_up(slowdown: float) -> None:
    workers = Workers(1)
    health = Health(workers, QuarantinePolicy(slowdown))
    workers.running = [(7, 0, DAY)]
    health.look({7: EVALUATION})
    assert workers.given_up == [], "nothing was seen yet"
    evaluated(health, {0: 20.0})
    workers.running = [(7, 0, 399.0), (8, 0, 1e5)]
    health.look({7: EVALUATION})
    assert workers.given_up == [], "400 s are twenty times as long; ticket 8 is another's"
    workers.running = [(7, 0, 401.0)]
    health.look({7: EVALUATION}, by_measure=False)
    assert workers.given_up == [], "it has a limit of its own"
    health.look({7: EVALUATION})
    assert workers.given_up == [(7, "at an evaluation for 401 s, and 400 s are far longer than any has taken")]
    assert workers.put == []


def test_beside_faster_peers_a_worker_is_put_in_quarantine_instead() -> None:
    workers = Workers(2)
    health = Health(workers, QuarantinePolicy())
    evaluated(health, {0: 20.0, 1: 20.0})
    workers.running = [(7, 1, 1000.0)]
    health.look({7: EVALUATION})
    assert [index for index, *_ in workers.put] == [1]
    assert workers.given_up == []
