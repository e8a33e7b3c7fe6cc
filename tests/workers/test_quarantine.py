"""Quarantine: the rules on numbers alone, then a slow and a failing worker on a real Ray."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest

import was_workers.pool as pool_module
from tests.search.coordinator.loop_doubles import SHAPE, Book, seeds
from tests.workers.bowl_worker import bowl_worker, evaluations
from was_search.budget import SparsityBudget
from was_search.calls import Work
from was_search.coordinator.health import Health, QuarantinePolicy
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.options import SearchOptions
from was_search.coordinator.search_progress import SearchProgress
from was_search.pool_state import PoolState
from was_search.slots import Slot, SlotState
from was_search.worker_range import WorkerRange
from was_workers import quarantine
from was_workers.cluster import Cluster, connect
from was_workers.pool import Pool
from was_workers.worker import WorkerSpec

EVALUATION = Work("an evaluation")

ENDLESS = 300.0
"""Seconds that no test needs, on however busy a machine: who waits so long is stuck."""


class Wards:
    """A pool that puts in quarantine whom it is told, but for the last of its workers."""

    def __init__(self, n: int) -> None:
        self.well = set(range(n))
        self.put: list[tuple[int, str, float]] = []
        self.running: list[tuple[int, int, float]] = []
        self.given_up: list[tuple[int, str]] = []

    def give_up(self, ticket: int, reason: str) -> None:
        self.given_up.append((ticket, reason))

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        if index not in self.well or len(self.well) == 1:
            return False
        self.well.remove(index)
        self.put.append((index, reason, seconds))
        return True


def evaluated(health: Health, paces: dict[int, float], times: int = 3, tokens: int = 100) -> None:
    for _ in range(times):
        for worker, seconds in paces.items():
            health.answered(worker, seconds, Work("an evaluation", tokens))


@pytest.mark.parametrize("n_workers", range(1, 8))
def test_what_is_kept_ready_of_all_paces_is_what_they_say_one_by_one(n_workers: int) -> None:
    """Among equal paces too; and a new call or a worker that has gone counts at once."""
    rng = random.Random(n_workers)
    paces = quarantine._Paces()
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
    wards = Wards(4)
    evaluated(Health(wards, QuarantinePolicy()), {0: 1.0, 1: 1.2, 2: 3.9, 3: 4.9})
    assert wards.put == [(3, "slow, 4.1 times its peers' seconds a token", 600.0)]


def test_a_worker_is_measured_by_tokens_and_not_by_seconds() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy())
    for _ in range(5):
        health.answered(0, 10.0, Work("an evaluation", 1000))
        health.answered(1, 1.0, Work("an evaluation", 100))
    assert wards.put == []


def test_one_long_evaluation_is_forgiven() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy())
    evaluated(health, {0: 1.0, 1: 1.0}, 4)
    health.answered(1, 60.0, Work("an evaluation", 100))
    evaluated(health, {0: 1.0, 1: 1.0}, 4)
    assert wards.put == []


def test_calls_lost_in_a_row_count_and_one_success_forgives_them() -> None:
    wards = Wards(3)
    health = Health(wards, QuarantinePolicy())
    for _ in range(3):
        health.lost(0, "GPU out of memory")
        health.lost(0, "GPU out of memory")
        health.answered(0, 1.0, Work("an evaluation", 100))
    assert wards.put == []
    for _ in range(3):
        health.lost(1, "it died")
    assert wards.put == [(1, "3 calls in a row were lost; the last: it died", 600.0)]


def test_the_last_worker_is_left_alone() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy(failures=1))
    health.lost(0, "it died")
    health.lost(1, "it died")
    assert [index for index, *_ in wards.put] == [0]


def test_each_further_time_is_twice_as_long_up_to_a_limit() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy(failures=1, seconds=10.0))
    for _ in range(7):
        health.lost(0, "it died")
        wards.well.add(0)
    assert [seconds for _, _, seconds in wards.put] == [10.0, 20.0, 40.0, 80.0, 160.0, 160.0, 160.0]


def test_a_call_in_flight_is_overdue_by_its_peers_pace() -> None:
    wards = Wards(3)
    health = Health(wards, QuarantinePolicy(slowdown=2.0))
    wards.running = [(7, 2, 3600.0)]
    health.look({7: EVALUATION})
    assert wards.put == [], "nothing is known of its peers"
    evaluated(health, {0: 4.0, 1: 4.0})
    wards.running = [(7, 2, 23.9), (8, 2, 3600.0)]
    health.look({7: EVALUATION})
    assert wards.put == [], "24 s are three times as long as what is slow; ticket 8 is no evaluation"
    wards.running = [(7, 2, 24.1)]
    health.look({7: EVALUATION})
    assert wards.put == [(2, "slow, at an evaluation for 24 s, 6 times what its peers take", 600.0)]


def test_calls_of_another_kind_say_nothing_of_a_pace() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy())
    for _ in range(4):
        health.answered(0, 1.0, Work("a calibration pass", 100))
        health.answered(1, 9.0, Work("a descent", 100))
    assert wards.put == []
    for _ in range(3):
        health.answered(1, 9.0, Work("a calibration pass", 100))
    assert wards.put == [(1, "slow, 9.0 times its peers' seconds a token", 600.0)]


def test_milliseconds_make_nobody_slow() -> None:
    """Calls of milliseconds take several times as long on a machine that is busy with something else."""
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy())
    evaluated(health, {0: 0.01, 1: 0.9})
    assert wards.put == []
    evaluated(health, {0: 0.01, 1: 1.1}, 5)
    assert [index for index, *_ in wards.put] == [1]


def test_a_processs_first_call_may_take_as_long_as_its_peers_first_ones() -> None:
    """They compiled their kernels too, and have forgotten it by their fourth call."""
    wards = Wards(3)
    health = Health(wards, QuarantinePolicy(slowdown=2.0))
    evaluated(health, {0: 40.0, 1: 40.0}, 1)
    evaluated(health, {0: 1.0, 1: 1.0}, 4)
    wards.running = [(7, 2, 119.0), (8, 1, 5.9)]
    health.look({7: Work("an evaluation", 100), 8: Work("an evaluation", 100)})
    assert wards.put == []
    wards.running = [(8, 1, 60.0)]
    health.look({8: Work("an evaluation", 100)})
    assert [index for index, *_ in wards.put] == [1], "it has had its first call"
    wards.running = [(7, 2, 121.0)]
    health.look({7: Work("an evaluation", 100)})
    assert [index for index, *_ in wards.put] == [1, 2]


def test_the_tokens_of_a_call_in_flight_count() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy(slowdown=2.0))
    evaluated(health, {0: 10.0}, tokens=100)
    wards.running = [(7, 1, 590.0)]
    health.look({7: Work("an evaluation", 1000)})
    assert wards.put == []
    health.look({7: Work("an evaluation", 900)})
    assert [index for index, *_ in wards.put] == [1]


def test_a_loss_is_suspicious_from_the_second_in_a_row_until_nothing_comes_of_it() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy(failures=3))
    assert [health.lost(0, "it died") for _ in range(3)] == [False, True, True]
    assert [health.lost(1, "it died") for _ in range(3)] == [False, True, False], "the last one stays"


def test_a_short_call_is_never_overdue() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy())
    evaluated(health, {0: 0.01})
    wards.running = [(1, 1, 9.0)]
    health.look({1: EVALUATION})
    assert wards.put == []


def test_zero_is_never() -> None:
    wards = Wards(3)
    health = Health(wards, QuarantinePolicy(slowdown=0.0, failures=0))
    evaluated(health, {0: 1.0, 1: 1.0, 2: 100.0})
    wards.running = [(1, 2, 1e6)]
    health.look({1: EVALUATION})
    for _ in range(9):
        health.lost(1, "it died")
    assert wards.put == []


DAY = 86400.0


def test_patience_is_twenty_times_the_slowest_by_tokens() -> None:
    health = Health(Wards(1), QuarantinePolicy())
    for seconds, tokens in [(20.0, 1000), (60.0, 2000), (50.0, 1000)]:
        health.answered(0, seconds, Work("an evaluation", tokens))
    assert health.patience(Work("an evaluation", 1000)) == pytest.approx(20 * 50.0)
    assert health.patience(Work("an evaluation", 400)) == pytest.approx(20 * 20.0)
    assert health.patience(EVALUATION) == pytest.approx(20 * 100.0), "as the longest one seen, at the slowest pace"


def test_patience_is_five_minutes_at_least_and_a_day_at_most() -> None:
    health = Health(Wards(1), QuarantinePolicy())
    health.answered(0, 0.1, Work("an evaluation", 100))
    assert health.patience(EVALUATION) == 300.0
    health.answered(0, 5000.0, Work("an evaluation", 100))
    assert health.patience(EVALUATION) == DAY


def test_patience_knows_only_what_was_seen_of_the_kind() -> None:
    """A first call compiles and loads: nothing else tells how long that takes."""
    health = Health(Wards(2), QuarantinePolicy())
    health.answered(0, 1.0, Work("a calibration pass", 100))
    health.answered(0, 1.0, Work("an evaluation"))  # its tokens are not known
    assert health.patience(Work("an evaluation", 100)) == DAY


def test_patience_forgets_what_was_slow_long_ago() -> None:
    health = Health(Wards(1), QuarantinePolicy())
    health.answered(0, 600.0, Work("an evaluation", 100))
    evaluated(health, {0: 30.0}, 4)
    assert health.patience(EVALUATION) == pytest.approx(20 * 600.0)
    evaluated(health, {0: 30.0}, 1)
    assert health.patience(EVALUATION) == pytest.approx(20 * 30.0)


@pytest.mark.parametrize("slowdown", [4.0, 0.0])
def test_a_lone_call_that_hangs_is_given_up(slowdown: float) -> None:
    wards = Wards(1)
    health = Health(wards, QuarantinePolicy(slowdown))
    wards.running = [(7, 0, DAY)]
    health.look({7: EVALUATION})
    assert wards.given_up == [], "nothing was seen yet"
    evaluated(health, {0: 20.0})
    wards.running = [(7, 0, 399.0), (8, 0, 1e5)]
    health.look({7: EVALUATION})
    assert wards.given_up == [], "400 s are twenty times as long; ticket 8 is another's"
    wards.running = [(7, 0, 401.0)]
    health.look({7: EVALUATION}, by_measure=False)
    assert wards.given_up == [], "it has a limit of its own"
    health.look({7: EVALUATION})
    assert wards.given_up == [(7, "at an evaluation for 401 s, and 400 s are far longer than any has taken")]
    assert wards.put == []


def test_beside_faster_peers_a_worker_is_put_in_quarantine_instead() -> None:
    wards = Wards(2)
    health = Health(wards, QuarantinePolicy())
    evaluated(health, {0: 20.0, 1: 20.0})
    wards.running = [(7, 1, 1000.0)]
    health.look({7: EVALUATION})
    assert [index for index, *_ in wards.put] == [1]
    assert wards.given_up == []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect("local", workers=3) as found:
        yield found


@pytest.fixture
def search(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., tuple[list[Slot], Pool, list[PoolState]]]]:
    """A search on bowl workers; returns its finished slots, its pool and what was shown of it.

    It ends with its last slot, or is drained once ``enough`` holds: how many trials that takes is a matter of pace.
    """
    opened: list[Pool] = []

    def run(
        n_trials: int,
        n_workers: int,
        policy: QuarantinePolicy,
        enough: Callable[[SearchProgress], bool] = lambda _: False,
        trial_timeout: float = 10 * ENDLESS,
    ):
        monkeypatch.setattr(pool_module, "Worker", bowl_worker(tmp_path, seconds=0.2))
        spec = WorkerSpec("m", "", "float32", "cpu", "l2")
        asked = WorkerRange(n_workers, n_workers)
        pool = Pool(cluster, spec, n_workers=asked, gpus_per_worker=0.0, policy=policy)
        opened.append(pool)
        end = time.monotonic() + ENDLESS
        while pool.n_idle < n_workers:  # all of them, so that each is given something
            assert time.monotonic() < end, pool.state
            pool.turn(0.2)
        shown: list[PoolState] = []
        drain = threading.Event()

        def progress(state: SearchProgress) -> None:
            shown.append(state.pool)
            if enough(state):
                drain.set()

        options = SearchOptions(SparsityBudget(SHAPE, 0.6), "qmc", 0.05, 0, False, 0.1, 1.0, trial_timeout, 3)
        loop = SearchLoop(
            Book(n_trials), pool, "data", "histograms",
            shape=SHAPE, seeds=seeds(), options=options, drain=drain, progress=progress,
        )  # fmt: skip
        return [slot for slot in loop.run() if slot.state is not SlotState.WAITING], pool, shown

    yield run
    for pool in opened:
        pool.close()


@pytest.mark.ray
@pytest.mark.slow
def test_a_slow_worker_gets_no_more_slots_and_another_takes_its_place(search, tmp_path: Path, caplog) -> None:
    (tmp_path / "slow-1").write_text("4.0")

    def enough(_: SearchProgress) -> bool:
        return evaluations(tmp_path).count(3) > 3

    slots, pool, shown = search(3000, 3, QuarantinePolicy(), enough)
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    began = evaluations(tmp_path)
    assert began.count(1) >= 3, "so many evaluations show that it is slow"
    assert began.count(3) > 3, "the worker in its place"
    assert len(slots) < 3000
    (held,) = shown[-1].quarantined
    assert "slow, " in held.reason and held.worker.startswith("worker-")
    assert shown[-1].ready == 3
    assert "is in quarantine for 600 s: slow, " in caplog.text
    assert pool.n_loaded == 4


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_hangs_is_taken_off_its_slot(search, tmp_path: Path) -> None:
    (tmp_path / "slow-0").write_text("86400")
    started = time.monotonic()
    slots, _, shown = search(24, 2, QuarantinePolicy())
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert 10.0 < time.monotonic() - started < 5 * ENDLESS, "ten seconds are waited, the trial's own time is not"
    assert len(evaluations(tmp_path)) == 25, "its slot was given out once more"
    (held,) = shown[-1].quarantined
    assert re.match(r"slow, at an evaluation for \d+ s", held.reason)


@pytest.mark.ray
@pytest.mark.slow
def test_the_only_worker_that_hangs_is_restarted_and_loses_no_slot(
    search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """By measure: there are no peers, and no limit was given."""
    monkeypatch.setattr(quarantine, "_LEAST_PATIENCE_SECONDS", 12.0)
    hang, hung, over = tmp_path / "slow-0", threading.Event(), threading.Event()

    def hang_once(state: SearchProgress) -> bool:
        if state.complete == 3 and not hung.is_set():
            hang.write_text("86400")
            hung.set()
        return False

    def heal() -> None:
        while "is restarted: at an evaluation for" not in caplog.text and not over.wait(0.1):
            pass
        hang.unlink(missing_ok=True)

    healer = threading.Thread(target=heal)
    healer.start()
    try:
        slots, _, shown = search(8, 1, QuarantinePolicy(), hang_once, trial_timeout=0.0)
    finally:
        over.set()
        healer.join()
    assert [slot.state for slot in slots] == [SlotState.COMPLETE] * 8
    assert sorted(slot.attempt for slot in slots) == [1] * 7 + [2]
    assert not shown[-1].quarantined


@pytest.mark.ray
@pytest.mark.slow
def test_a_failing_worker_costs_no_slot_and_does_not_stay_in_quarantine(search, tmp_path: Path, caplog) -> None:
    """Three deaths, three slots with one loss each; released after its time, it takes its share again, or goes."""
    (tmp_path / "failing-1").touch()

    failing = tmp_path / "failing-1"

    def healed(state: SearchProgress) -> bool:
        if state.pool.quarantined:
            failing.unlink(missing_ok=True)
        return not state.pool.quarantined and not failing.exists()

    slots, pool, shown = search(3000, 3, QuarantinePolicy(slowdown=0.0, seconds=3.0), healed)
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    began = evaluations(tmp_path)
    assert len(began) == len(slots) + 3 < 3000
    reasons = {each.reason for state in shown for each in state.quarantined}
    assert len(reasons) == 1
    assert reasons.pop().startswith("3 calls in a row were lost; the last: Actor")
    assert not shown[-1].quarantined
    assert "from quarantine" in caplog.text
    assert pool.n_workers == 3


@pytest.mark.ray
@pytest.mark.slow
def test_where_all_others_have_gone_a_worker_is_released_before_its_time(search, tmp_path: Path, caplog) -> None:
    (tmp_path / "slow-0").write_text("4.0")
    _, pool, shown = search(3000, 2, QuarantinePolicy(), lambda state: bool(state.pool.quarantined))
    assert len(shown[-1].quarantined) == 1
    assert not pool.quarantine(next(m.index for m in pool._crew.members if m.quarantine), "again", 60.0)
    for member in [m for m in pool._crew.members if m.stays]:
        pool._crew.restart(member)
    pool._size.keep()
    assert not pool.state.quarantined
    end = time.monotonic() + ENDLESS
    while pool.n_idle < 1:
        assert time.monotonic() < end, pool.state
        pool.wait(0.2)
    assert "released from quarantine: no other worker is ready" in caplog.text
