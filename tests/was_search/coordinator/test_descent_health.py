"""Descents on a sick worker, and what their log lines tell: without Ray or Postgres."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.pool_double import Given
from tests.doubles.descending_pool import DATA, DescendingPool
from tests.doubles.loop_doubles import BRIEF, SHAPE, search_options, seeds
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.calls import Call
from was_search.coordinator.descents import DescentPlan
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.model_calls import Descend
from was_search.errors import TransientError
from was_search.process.logs import bound
from was_search.studies.slots import Slot
from was_search.vectors.descent import DescentOptions


class PartlySick(DescendingPool):
    """Two workers, of which those of ``sick`` lose every descent that they are given.

    The other one answers only when it is its turn, so that the sick one may lose many meanwhile.
    """

    def __init__(self, sick: set[int]) -> None:
        super().__init__(due=self._sick_first)
        self.sick = sick
        self.abouts: list[dict[str, Any]] = []

    def submit(self, call: Call[Any], *, about: Any = None, **options: Any) -> int:
        if isinstance(call, Descend):
            self.abouts.append(about)
        return super().submit(call, about=about, **options)

    def _is_lost(self, given: Given) -> bool:
        return isinstance(given.call, Descend) and given.index in self.sick

    def _sick_first(self, running: Sequence[Given]) -> Sequence[Given]:
        return [given for given in running if self._is_lost(given)][:1] or running[:1]

    def _answer(self, given: Given) -> Any:
        if self._is_lost(given):
            raise ConnectionError("CUDA error: uncorrectable ECC error")
        return super()._answer(given)


def search(pool: PartlySick) -> list[Slot]:
    descents = DescentPlan(2, (0.04, 0.015), DescentOptions(rounds=12), 4, DATA)
    options = search_options(**BRIEF, descents=descents)
    return SearchLoop(
        MemorySlots(10), pool, DATA, None, shape=SHAPE, seeds=seeds(), options=options, drain=threading.Event()
    ).run()


def test_a_worker_that_loses_every_descent_ends_no_search() -> None:
    """One chain is lost three times by the same worker while the other one is busy: the worker is to blame."""
    pool = PartlySick({0})
    slots, undisturbed = search(pool), search(PartlySick(set()))
    reason = "3 calls in a row were lost; the last: ConnectionError: CUDA error: uncorrectable ECC error"
    assert pool.put == [(0, reason, 600.0)]
    assert [slot.origin for slot in slots] == [slot.origin for slot in undisturbed]
    for ours, theirs in zip(slots, undisturbed, strict=True):
        np.testing.assert_array_equal(ours.sparsities, theirs.sparsities)


def test_a_chain_that_all_workers_lose_ends_the_search() -> None:
    with pytest.raises(TransientError, match=r"a descent was lost 3 times, last on worker-\d: CUDA error"):
        search(PartlySick({0, 1}))


def test_every_descent_carries_its_ids_here_and_on_its_worker(caplog) -> None:
    pool = PartlySick({0})
    with bound(study="s"), caplog.at_level(logging.INFO, logger="was_search.coordinator.descents"):
        search(pool)
    first, second = pool.abouts[0], pool.abouts[1]
    assert first.pop("worker") in ("worker-0", "worker-1")
    assert first == {"study": "s", "phase": "descent", "epoch": 0, "chain": 0, "attempt": 1}
    assert second["chain"] == 1
    assert {about["epoch"] for about in pool.abouts} == {0, 1}
    assert max(about["attempt"] for about in pool.abouts) == 4, "three losses, and the one that ended"
    told: dict[str, list[dict[str, Any]]] = {}
    for record in caplog.records:
        told.setdefault(record.getMessage(), []).append(record.fields)
    assert len(told["descent handed out"]) == len(pool.abouts)
    assert len(told["descent put back"]) == 3
    assert len(told["descent ended"]) == 4
    assert all({"study", "epoch", "chain", "attempt", "worker"} <= set(f) for lines in told.values() for f in lines)
