"""A search without Ray or Postgres, on the doubles of ``loop_doubles``."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.doubles.loop_doubles import SHAPE, seeds, two_workers
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.options import SearchOptions
from was_search.studies.slots import Slot
from was_search.vectors.budget import SparsityBudget


@pytest.fixture
def run():
    """``run(store, answer, ...)``: the slots after a search; further options are those of SearchOptions."""

    def start(
        store: MemorySlots,
        answer,
        *,
        drain: threading.Event | None = None,
        progress=None,
        pool=two_workers,
        **options: Any,
    ) -> list[Slot]:
        wanted = {
            "budget": SparsityBudget(SHAPE, 0.6),
            "sampler": "tpe",
            "radius": 0.1,
            "seed": 0,
            "early_stopping": True,
            "significance": 0.1,
            "rung_keep": 0.5,
            "trial_timeout": 60.0,
            "max_attempts": 3,
            **options,
        }
        loop = SearchLoop(
            store,
            pool(answer),
            "tokens",
            "histograms",
            shape=SHAPE,
            seeds=seeds(),
            options=SearchOptions(**wanted),
            drain=drain or threading.Event(),
            progress=progress or (lambda _: None),
        )
        return loop.run()

    return start
