"""A search without Ray or Postgres, on the doubles of ``loop_doubles``."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.doubles.loop_doubles import SHAPE, search_options, seeds, two_workers
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.loop import SearchLoop
from was_search.studies.slots import Slot


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
        loop = SearchLoop(
            store,
            pool(answer),
            "tokens",
            "histograms",
            shape=SHAPE,
            seeds=seeds(),
            options=search_options(**options),
            drain=drain or threading.Event(),
            progress=progress or (lambda _: None),
        )
        return loop.run()

    return start
