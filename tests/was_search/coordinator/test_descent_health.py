"""Descents on a sick worker, and what their log lines tell: without Ray or Postgres."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest

from tests.doubles.loop_doubles import SHAPE, Book, seeds
from tests.was_search.coordinator.test_descents import DATA
from tests.was_search.coordinator.test_descents import Pool as DescendingPool
from was_search.coordinator.contracts import Outcome
from was_search.coordinator.descents import DescentPlan
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.model_calls import Descend
from was_search.coordinator.options import SearchOptions
from was_search.errors import TransientError
from was_search.process.logs import bound
from was_search.studies.slots import Slot
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions


class Numbered(DescendingPool):
    """Two workers with numbers, one of which loses every descent that it is given; it restarts at once.

    The other one answers only when it is its turn, so that the sick one may lose many meanwhile.
    """

    def __init__(self, sick: set[int]) -> None:
        super().__init__()
        self.sick = sick
        self.proven = frozenset({0, 1})
        self.idle = [0, 1]
        self.at: dict[int, int] = {}
        self.abouts: list[dict[str, Any]] = []
        self.put: list[tuple[int, str]] = []

    @property
    def n_idle(self) -> int:
        return len(self.idle)

    @property
    def next_index(self) -> int:  # type: ignore[override]
        return self.idle[0]

    @property
    def next_idle(self) -> str:  # type: ignore[override]
        return f"worker-{self.idle[0]}"

    @property
    def idle_names(self) -> list[str]:
        return [f"worker-{index}" for index in self.idle]

    def submit(self, call, *, deadline_seconds, about=None):
        self.tickets += 1
        self.at[self.tickets] = self.idle.pop(0)
        self.given.append((self.tickets, call))
        if isinstance(call, Descend):
            self.abouts.append(about)
        return self.tickets

    def wait(self, timeout_seconds):
        lost = [entry for entry in self.given if isinstance(entry[1], Descend) and self.at[entry[0]] in self.sick]
        if lost:
            self.given.remove(lost[0])
            index = self.at.pop(lost[0][0])
            self.idle.insert(0, index)
            error = ConnectionError("CUDA error: uncorrectable ECC error")
            return [Outcome(lost[0][0], f"worker-{index}", error=error, lost=True, index=index, seconds=1.0)]
        outcomes = super().wait(timeout_seconds)
        for outcome in outcomes:
            index = self.at.pop(outcome.ticket)
            if index in self.proven:
                self.idle.append(index)
        return [
            Outcome(o.ticket, f"worker-{i}", value=o.value, index=i, seconds=1.0) for o in outcomes for i in [index]
        ]

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        if len(self.proven) == 1:
            return False
        self.proven -= {index}
        self.idle = [other for other in self.idle if other != index]
        self.put.append((index, reason))
        return True


def search(pool: Numbered) -> list[Slot]:
    options = SearchOptions(
        budget=SparsityBudget(SHAPE, 0.6),
        sampler="qmc",
        radius=0.05,
        seed=0,
        early_stopping=False,
        significance=0.1,
        rung_keep=0.5,
        trial_timeout=60.0,
        max_attempts=3,
        descents=DescentPlan(2, (0.04, 0.015), DescentOptions(rounds=12), 4, DATA),
    )
    return SearchLoop(
        Book(10), pool, DATA, None, shape=SHAPE, seeds=seeds(), options=options, drain=threading.Event()
    ).run()


def test_a_worker_that_loses_every_descent_ends_no_search() -> None:
    """One chain is lost three times by the same worker while the other one is busy: the worker is to blame."""
    pool = Numbered({0})
    slots, undisturbed = search(pool), search(Numbered(set()))
    reason = "3 calls in a row were lost; the last: ConnectionError: CUDA error: uncorrectable ECC error"
    assert pool.put == [(0, reason)]
    assert [slot.origin for slot in slots] == [slot.origin for slot in undisturbed]
    for ours, theirs in zip(slots, undisturbed, strict=True):
        np.testing.assert_array_equal(ours.sparsities, theirs.sparsities)


def test_a_chain_that_all_workers_lose_ends_the_search() -> None:
    with pytest.raises(TransientError, match=r"a descent was lost 3 times, last on worker-\d: CUDA error"):
        search(Numbered({0, 1}))


def test_every_descent_carries_its_ids_here_and_on_its_worker(caplog) -> None:
    pool = Numbered({0})
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
