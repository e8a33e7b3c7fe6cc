"""Phases before the search on a real Ray: a worker that dies, hangs or is slow there ends none of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import was_workers.pool as pool_module
from tests.doubles.ask import Ask
from tests.doubles.bowl_worker import bowl_worker, evaluations
from tests.doubles.loop_doubles import BRIEF, SHAPE, search_options, seeds
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.health import QuarantinePolicy
from was_search.coordinator.loop import SearchLoop
from was_search.errors import TransientError
from was_search.process.logs import bound
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import SlotState
from was_workers.cluster import Cluster, connect
from was_workers.pool import Pool
from was_workers.worker import WorkerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow(seconds=10)]

ENDLESS = 300.0
"""Seconds that no test needs: who waits so long is stuck."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect("local", workers=3) as found:
        yield found


@pytest.fixture
def start(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Pool]]:
    """A pool of bowl workers, all of them idle."""
    opened: list[Pool] = []

    def make(n: int, **policy: Any) -> Pool:
        monkeypatch.setattr(pool_module, "Worker", bowl_worker(tmp_path, seconds=0.2))
        spec = WorkerSpec("m", "", "float32", "cpu", "l2")
        pool = Pool(cluster, spec, n_workers=n, gpus_per_worker=0.0, policy=QuarantinePolicy(**policy))
        opened.append(pool)
        end = time.monotonic() + ENDLESS
        while pool.n_idle < n:
            assert time.monotonic() < end, pool.state
            pool.turn(0.2)
        return pool

    yield make
    for pool in opened:
        pool.close()


def shards(n: int, tokens: float = 0.0) -> list[Ask]:
    return [Ask("shard", number, tokens=tokens) for number in range(n)]


def map_until_quarantine(pool: Pool, n: int, *, phase: str, tokens: float = 0.0) -> None:
    """Phases of ``n`` shards, until a worker is in quarantine: how many that takes is a matter of pace."""
    end = time.monotonic() + ENDLESS
    while not pool.state.quarantined:
        assert time.monotonic() < end, pool.state
        assert values(pool.map(shards(n, tokens), phase=phase)) == list(range(n))


def values(found: list[Any]) -> list[Any]:
    return [value for value, *_ in found]


@pytest.fixture
def once() -> Iterator[Callable[[Callable[[], bool], Callable[[], None]], None]]:
    """``once(condition, action)``: acts when the condition holds, while the test waits for its phase."""
    over = threading.Event()
    threads = []

    def watch(condition: Callable[[], bool], action: Callable[[], None]) -> None:
        def run() -> None:
            while not over.wait(0.05):
                if condition():
                    action()
                    return

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield watch
    over.set()
    for thread in threads:
        thread.join()


def test_a_worker_that_dies_at_every_call_ends_no_phase(start, once, tmp_path: Path, caplog) -> None:
    """The other one is busy until then: the sick worker gets the same shard again and again, and is to blame."""
    pool = start(2)
    (tmp_path / "failing-0").touch()
    (tmp_path / "held-1").touch()
    once(lambda: bool(pool.state.quarantined), (tmp_path / "held-1").unlink)
    with bound(study="s"):
        found = pool.map(shards(2), phase="calibrate")
    assert values(found) == [0, 1]
    assert {number for _, number, _ in found} <= {1, 2}, "and the one that was started in its place"
    assert evaluations(tmp_path).count(0) == 3
    (held,) = pool.state.quarantined
    assert held.reason.startswith("3 calls in a row were lost; the last: Actor")
    assert "is in quarantine for 600 s: 3 calls in a row were lost" in caplog.text
    assert pool.state.asked == "2"


def test_a_worker_that_hangs_is_taken_off_its_shard(start, tmp_path: Path) -> None:
    """Each worker has one shard: its peers' are all that its own can be compared with."""
    pool = start(3)
    (tmp_path / "slow-1").write_text("86400")
    found = pool.map([Ask("shard", i, tokens=n) for i, n in enumerate([100, 100, 50])], phase="calibrate")
    assert values(found) == [0, 1, 2]
    (held,) = pool.state.quarantined
    assert held.reason.startswith("slow, at shard for 1")
    (again,) = [about for _, _, about in found if about["attempt"] == 2]
    assert again["phase"] == "calibrate"


def test_a_slow_worker_gets_no_more_of_a_long_phase(start, tmp_path: Path) -> None:
    pool = start(3)
    (tmp_path / "slow-2").write_text("4.0")
    map_until_quarantine(pool, 20, tokens=400, phase="price")
    seen = evaluations(tmp_path).count(2)
    assert seen >= 3, "it takes three to show that it is slow"
    assert values(pool.map(shards(30, 400), phase="price")) == list(range(30))
    assert evaluations(tmp_path).count(2) == seen
    (held,) = pool.state.quarantined
    assert "times its peers' seconds a token" in held.reason


def test_the_search_begins_with_what_the_phases_found(start, tmp_path: Path) -> None:
    pool = start(2)
    (tmp_path / "failing-1").touch()
    shown: list[PoolState] = []
    map_until_quarantine(pool, 10, phase="price")
    loop = SearchLoop(
        MemorySlots(8), pool, "data", "histograms", shape=SHAPE, seeds=seeds(), drain=threading.Event(),
        options=search_options(trial_timeout=120.0, **BRIEF),
        progress=lambda progress: shown.append(progress.pool),
    )  # fmt: skip
    assert all(slot.state is SlotState.COMPLETE for slot in loop.run())
    assert len(shown[0].quarantined) == 1
    assert evaluations(tmp_path).count(1) == 3


def test_a_call_that_every_worker_loses_ends_the_phase(start, tmp_path: Path) -> None:
    pool = start(2)
    (tmp_path / "failing-0").touch()
    (tmp_path / "failing-1").touch()
    (tmp_path / "failing-2").touch()
    with pytest.raises(TransientError, match=r"shard: lost \d times, last on worker-"):
        pool.map(shards(1), phase="calibrate")
    assert len(evaluations(tmp_path)) >= 3


def test_every_shard_carries_its_ids(start) -> None:
    pool = start(2)
    with bound(study="s"):
        found = pool.map(shards(4), phase="calibrate")
    for number, (_, worker, about) in enumerate(found):
        name = about.pop("worker")
        assert name.startswith("worker-") and worker in (0, 1)
        assert about == {"study": "s", "phase": "calibrate", "part": number, "attempt": 1}
    assert pool.map(shards(1))[0][2] is None, "no phase, no ids"
