"""The doubles keep the contracts that the real pool and the real storage keep."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.harness.pool_double import Given, PoolDouble, run_here
from tests.doubles.memory_slots import MemorySlots
from tests.doubles.pool_rules import Die, Hold, PoolRules
from tests.doubles.slot_rules import SlotRules
from was_search.coordinator.health import QuarantinePolicy

NEVER = QuarantinePolicy(slowdown=0.0, failures=0)


def answer(given: Given) -> object:
    if isinstance(given.call, Die):
        raise ConnectionError("it died")
    return run_here(given)


def not_held(running: Sequence[Given]) -> Sequence[Given]:
    return [given for given in running if not (isinstance(given.call, Hold) and given.call.held)]


class TestPoolDouble(PoolRules):
    @pytest.fixture
    def pool(self) -> PoolDouble:
        return PoolDouble(answer, due=not_held, policy=NEVER)


class TestMemorySlots(SlotRules):
    @pytest.fixture
    def store(self) -> MemorySlots:
        return MemorySlots(4)
