"""Quarantine: a slow and a failing worker on a real Ray."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import was_workers.pool as pool_module
from tests.doubles.bowl_worker import bowl_worker, evaluations
from tests.doubles.loop_doubles import BRIEF, SHAPE, search_options, seeds
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator import health
from was_search.coordinator.health import QuarantinePolicy
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.search_progress import SearchProgress
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import Slot, SlotState
from was_search.studies.worker_range import WorkerRange
from was_workers.cluster import Cluster, connect
from was_workers.pool import Pool
from was_workers.worker import WorkerSpec

ENDLESS = 300.0
"""Seconds that no test needs, on however busy a machine: who waits so long is stuck."""


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

        options = search_options(trial_timeout=trial_timeout, **BRIEF)
        loop = SearchLoop(
            MemorySlots(n_trials), pool, "data", "histograms",
            shape=SHAPE, seeds=seeds(), options=options, drain=drain, progress=progress,
        )  # fmt: skip
        return [slot for slot in loop.run() if slot.state is not SlotState.WAITING], pool, shown

    yield run
    for pool in opened:
        pool.close()


@pytest.mark.ray
@pytest.mark.slow(seconds=18)
def test_a_slow_worker_gets_no_more_slots_and_another_takes_its_place(search, tmp_path: Path, caplog) -> None:
    (tmp_path / "slow-1").write_text("4.0")

    def enough(_: SearchProgress) -> bool:
        return evaluations(tmp_path).count(3) > 3

    slots, pool, shown = search(3000, 3, QuarantinePolicy(), enough)
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    began = evaluations(tmp_path)
    assert began.count(1) >= 3, "it takes three evaluations to show that it is slow"
    assert began.count(3) > 3, "the worker in its place"
    assert len(slots) < 3000
    (held,) = shown[-1].quarantined
    assert "slow, " in held.reason and held.worker.startswith("worker-")
    assert shown[-1].ready == 3
    assert "is in quarantine for 600 s: slow, " in caplog.text
    assert pool.n_loaded == 4


@pytest.mark.ray
@pytest.mark.slow(seconds=18)
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
@pytest.mark.slow(seconds=18)
def test_the_only_worker_that_hangs_is_restarted_and_loses_no_slot(
    search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """By measure: there are no peers, and no limit was given."""
    monkeypatch.setattr(health, "_LEAST_PATIENCE_SECONDS", 12.0)
    monkeypatch.setattr(health, "_PATIENCE", 4.0)  # a busy machine's slowest call times 20 is a minute
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
@pytest.mark.slow(seconds=18)
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
@pytest.mark.slow(seconds=18)
def test_where_all_others_have_gone_a_worker_is_released_before_its_time(search, tmp_path: Path, caplog) -> None:
    (tmp_path / "slow-0").write_text("4.0")
    _, pool, shown = search(3000, 2, QuarantinePolicy(), lambda state: bool(state.pool.quarantined))
    assert len(shown[-1].quarantined) == 1
    assert not pool.quarantine(next(m.index for m in pool._members.all if m.quarantine), "again", 60.0)
    for member in [m for m in pool._members.all if m.stays]:
        pool._members.restart(member)
    pool._size.keep()
    assert not pool.state.quarantined
    end = time.monotonic() + ENDLESS
    while pool.n_idle < 1:
        assert time.monotonic() < end, pool.state
        pool.wait(0.2)
    assert "released from quarantine: no other worker is ready" in caplog.text
