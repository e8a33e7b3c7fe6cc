"""What the search loop needs without Ray or Postgres: a shape, seeds, and pools that answer as they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from benchmarks.harness.pool_double import Given, PoolDouble
from was_search.coordinator.model_calls import Evaluate
from was_search.coordinator.options import SearchOptions
from was_search.masks.early_stop import StopRule
from was_search.shape import ModelShape
from was_search.texts.protocol import Evaluation
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.seeds import Seed, baseline_seeds, fisher_seed
from was_search.vectors.table import Table, uniform_table

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 16),) * 3, ((8, 4, 4, 8, 16, 16, 8),) * 3)
GRID = np.linspace(0.0, 0.95, 20)
PRICES = np.tile(GRID**2, (3, 7, 1)) * np.arange(1, 22).reshape(3, 7, 1)


Answer = Callable[[int, np.ndarray, Any], Evaluation]
"""Of an evaluation's ticket, its sparsities and its rule; raises what the call ends with."""


def one_worker(answer: Answer) -> PoolDouble:
    """There is no other one that could have what it loses."""
    return PoolDouble(evaluations(answer), 1)


def two_workers(answer: Answer) -> PoolDouble:
    """Their calls end one by one."""
    return PoolDouble(evaluations(answer))


def many_workers(answer: Answer) -> PoolDouble:
    """Sixteen workers; all that run end together at every fourth look."""
    looks = count(1)
    return PoolDouble(evaluations(answer), 16, due=lambda running: [] if next(looks) % 4 else running)


def evaluations(answer: Answer) -> Callable[[Given], Evaluation]:
    """For a pool that gets nothing but evaluations."""

    def of(given: Given) -> Evaluation:
        assert isinstance(given.call, Evaluate)
        return answer(given.ticket, given.call.sparsities, given.call.rule)

    return of


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


def seeds() -> list[Seed]:
    greedy = Table("greedy", uniform_table(SHAPE).blocks)
    return [*baseline_seeds(SparsityBudget(SHAPE, 0.6), greedy), fisher_seed(PRICES, GRID, SparsityBudget(SHAPE, 0.6))]


def search_options(**changes: Any) -> SearchOptions:
    """Those of a search for 60 % of :data:`SHAPE`."""
    usual: dict[str, Any] = {
        "budget": SparsityBudget(SHAPE, 0.6),
        "sampler": "tpe",
        "radius": 0.1,
        "seed": 0,
        "early_stopping": True,
        "significance": 0.1,
        "rung_keep": 0.5,
        "trial_timeout": 60.0,
        "max_attempts": 3,
    }
    return SearchOptions(**{**usual, **changes})


BRIEF: dict[str, Any] = {"sampler": "qmc", "radius": 0.05, "early_stopping": False, "rung_keep": 1.0}
"""Options of a search that spends no time on choosing vectors and evaluates each in full."""
