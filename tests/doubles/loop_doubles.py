"""What the search loop needs without Ray or Postgres: slots in memory, and a pool that answers as it is told."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.doubles.steady_pool import SteadyPool
from was_search.coordinator.contracts import Outcome
from was_search.coordinator.model_calls import Evaluate
from was_search.masks.early_stop import StopRule
from was_search.shape import ModelShape
from was_search.studies.hand_outs import HandOut, Result
from was_search.studies.slots import Slot, SlotState
from was_search.texts.protocol import Evaluation
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.seeds import baseline_seeds, fisher_seed
from was_search.vectors.table import Table, uniform_table

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 16),) * 3, ((8, 4, 4, 8, 16, 16, 8),) * 3)
GRID = np.linspace(0.0, 0.95, 20)
PRICES = np.tile(GRID**2, (3, 7, 1)) * np.arange(1, 22).reshape(3, 7, 1)


class Book:
    """Slots in memory, with storage's rules: a slot finishes once, by the attempt that runs."""

    def __init__(self, n: int) -> None:
        self.rows = [Slot(i, SlotState.WAITING) for i in range(n)]
        self.finishes: list[int] = []
        self.attrs: dict[int, dict[str, Any]] = {}

    def slots(self) -> list[Slot]:
        return list(self.rows)

    def _set(self, number: int, **changes: Any) -> None:
        self.rows[number] = dataclasses.replace(self.rows[number], **changes)

    def propose(self, number, *, origin, params, distributions, levels, sparsities, attrs) -> None:
        assert self.rows[number].levels is None
        assert all(distributions[name]._contains(value) for name, value in params.items())
        self._set(number, origin=origin, params=dict(params), levels=levels, sparsities=sparsities)

    def start(self, number: int, worker: str, lease_seconds: float) -> int:
        assert self.rows[number].state is SlotState.WAITING
        self._set(number, state=SlotState.RUNNING, attempt=self.rows[number].attempt + 1, worker=worker)
        return self.rows[number].attempt

    def trial_of(self, number: int) -> int | None:
        return None

    def begin(self, hand_outs: list[HandOut], lease_seconds: float) -> list[int]:
        for hand_out in hand_outs:
            if hand_out.proposal is not None:
                self.propose(hand_out.number, **vars(hand_out.proposal))
        return [self.start(hand_out.number, hand_out.worker, lease_seconds) for hand_out in hand_outs]

    def finish_all(self, results: list[Result]) -> list[bool]:
        return [self.finish(**vars(result)) for result in results]

    def requeue(self, number: int, reason: str) -> None:
        self._set(number, state=SlotState.WAITING, error=reason)

    def finish(self, number: int, attempt: int, state: SlotState, *, attrs=None, **result: Any) -> bool:
        assert self.rows[number].state is SlotState.RUNNING
        assert self.rows[number].attempt == attempt
        self.finishes.append(number)
        self.attrs[number] = dict(attrs or {})
        self._set(number, state=state, **result)
        return True


class Pool(SteadyPool):
    """Two workers; ``answer(call, sparsities, rule)`` gives a value, or raises what the call ends with."""

    def __init__(self, answer: Callable[[int, np.ndarray, Any], Evaluation]) -> None:
        self.answer = answer
        self.calls: list[tuple[np.ndarray, Any]] = []
        self._running: deque[tuple[int, Evaluate]] = deque()

    @property
    def n_idle(self) -> int:
        return 2 - len(self._running)

    @property
    def idle_names(self) -> list[str]:
        return ["worker"] * self.n_idle

    def submit(self, call: Any, *, deadline_seconds: float, about: Any = None) -> int:
        assert isinstance(call, Evaluate)
        self.calls.append((call.sparsities, call.rule))
        self._running.append((len(self.calls) - 1, call))
        return len(self.calls) - 1

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        if not self._running:
            return []
        ticket, call = self._running.popleft()
        try:
            return [Outcome(ticket, "worker", value=self.answer(ticket, call.sparsities, call.rule))]
        except ConnectionError as error:
            return [Outcome(ticket, "worker", error=error, lost=True)]
        except Exception as error:
            return [Outcome(ticket, "worker", error=error)]


def evaluation(sparsities: np.ndarray, loss: float | None = None) -> Evaluation:
    """A bowl around 0.6: the uniform vector is best."""
    mean = float(np.square(sparsities - 0.6).sum()) + 2.0 if loss is None else loss
    return Evaluation(np.full(4, mean), 400, 0.01, False, sparsities)


NOISE = np.array([0.3, -0.2, 0.1, 0.4, -0.3, -0.1, -0.4, 0.2])
"""Of eight sequences, the same for every vector; its mean is zero."""


def bowl(sparsities: np.ndarray) -> float:
    return float(np.square(sparsities - 0.6).sum()) + 2.0


def in_steps(sparsities: np.ndarray, rule: StopRule | None) -> Evaluation:
    """The bowl on eight sequences in batches of one, as an evaluator goes through them."""
    losses = bowl(sparsities) + NOISE
    seen = next((n for n in range(1, 8) if rule is not None and rule.stops(losses[:n])), 8)
    return Evaluation(losses[:seen], 100 * seen, 0.01, seen < 8, sparsities)


def divergence(sparsities: np.ndarray) -> Evaluation:
    """Best where the NLL is worst."""
    found = evaluation(sparsities)
    return dataclasses.replace(found, losses=10.0 - found.losses, nats=found.losses)


def seeds():
    greedy = Table("greedy", uniform_table(SHAPE).blocks)
    return [*baseline_seeds(SparsityBudget(SHAPE, 0.6), greedy), fisher_seed(PRICES, GRID, SparsityBudget(SHAPE, 0.6))]


class ManyWorkers(Pool):
    """Sixteen workers; all that run end together at every fourth look."""

    looks = 0

    @property
    def n_idle(self) -> int:
        return 16 - len(self._running)

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        self.looks += 1
        if self.looks % 4:
            return []
        return [outcome for _ in range(len(self._running)) for outcome in super(ManyWorkers, self).wait(0.0)]
