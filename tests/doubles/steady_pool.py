"""What the loop asks of a pool besides calls, for doubles whose workers come to no harm."""

from __future__ import annotations

from functools import cached_property
from typing import TypeVar

from was_search.coordinator.calls import Held
from was_search.coordinator.health import Health, QuarantinePolicy
from was_search.studies.pool_state import PoolState

T = TypeVar("T")


class SteadyPool:
    """Its workers have no numbers, so none is put in quarantine; ``needed`` is the last need."""

    n_workers = 2
    needed: int | None = None
    next_idle = "worker"
    next_index = -1
    proven = frozenset({-1})

    @cached_property
    def health(self) -> Health:
        return Health(self, QuarantinePolicy())

    @property
    def state(self) -> PoolState:
        return PoolState(str(self.n_workers), ready=self.n_workers)

    @property
    def running(self) -> list[tuple[int, int, float]]:
        return []

    def share(self, value: T) -> Held[T]:
        return Held(value)

    def need(self, n: int) -> None:
        self.needed = n

    def quarantine(self, index: int, reason: str, seconds: float) -> bool:
        return False

    def give_up(self, ticket: int, reason: str) -> None:
        raise AssertionError("nothing runs")
