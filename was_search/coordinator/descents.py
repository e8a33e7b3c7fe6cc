"""The descents of a search: epochs of several chains on the pool, each from the best vector so far."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from was_search.coordinator.calls import Call, Shared, Work
from was_search.coordinator.contracts import LONGEST_CALL_SECONDS, Outcome, WorkerPool
from was_search.coordinator.divided_passes import DividedDescent, worth_dividing
from was_search.coordinator.lost_calls import LostCalls
from was_search.coordinator.model_calls import Descend, descent_tokens
from was_search.errors import InfeasibleError, TransientError
from was_search.masks.histogram import Histograms
from was_search.process.logs import bound_fields, event
from was_search.shape import FloatArray
from was_search.studies.origin import Origin, OriginKind
from was_search.studies.slots import Slot, best_slot
from was_search.texts.protocol import TokenSet
from was_search.vectors.budget import Budget
from was_search.vectors.descent import HIGHEST_DESCENDED, DescentOptions, chain_seed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DescentPlan:
    """How a search descends.

    Attributes:
        epochs: each starts at the best vector of those before it, with half their step.
        steps: first step of each chain in the first epoch; chains also differ in the sequences of their slopes.
        options: all options of a chain but its step.
        per_round: sequences of one round.
        data: the sequences to draw from.
    """

    epochs: int
    steps: tuple[float, ...]
    options: DescentOptions
    per_round: int
    data: TokenSet

    @property
    def tokens(self) -> int:
        """Tokens of one chain."""
        return descent_tokens(self.data.protocol, self.options, self.per_round)


class _Task(NamedTuple):
    """A chain, or a part of one of its rounds."""

    chain: int
    round: int = 0
    part: int = 0


class Descents:
    """Runs the plan's epochs. Knows no database: the slots tell which epochs have been proposed.

    An epoch's chains end in as many vectors, and their mean is one more: it has less of the noise of each. All
    become slots, called ``descent:EPOCH:CHAIN`` and ``descent:EPOCH:mean``. If the coordinator dies before they
    do, the chains run again and, being pure, give the same.

    Args:
        plan: epochs, steps and data.
        pool: its workers run the chains.
        histograms: taken near the seeds, shared.
        budget: what every vector spends.
        seed: decides which sequences the chains draw.
        seconds_per_token: the slowest a worker may be before a chain is taken for lost; 0: by measure.
        max_attempts: attempts at one chain; see :class:`was_search.coordinator.lost_calls.LostCalls`.
    """

    def __init__(
        self,
        plan: DescentPlan,
        pool: WorkerPool,
        histograms: Shared[Histograms],
        *,
        budget: Budget,
        seed: int,
        seconds_per_token: float,
        max_attempts: int,
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._histograms = histograms
        self._data: Shared[TokenSet] | None = None
        self._budget = budget
        self._seed = seed
        self._deadline = max(60.0, plan.tokens * seconds_per_token) if seconds_per_token else LONGEST_CALL_SECONDS
        self._max_attempts = max_attempts
        self._lost = LostCalls(pool, max_attempts)
        self._epoch = -1
        self._waiting: deque[_Task] = deque()
        self._running: dict[int, tuple[_Task, Work]] = {}
        self._attempts: Counter[_Task] = Counter()
        self._divided: dict[int, DividedDescent] = {}
        self._start: FloatArray | None = None
        self._ends: dict[int, FloatArray] = {}
        self._proposals: deque[tuple[Origin, FloatArray]] = deque()

    @property
    def running(self) -> bool:
        """Whether chains are under way or wait for a worker."""
        return bool(self._running or self._waiting)

    @property
    def describe(self) -> str:
        return (
            f"descent {self._epoch + 1} of {self._plan.epochs}, "
            f"{len(self._plan.steps)} chain(s) of {self._plan.options.rounds} rounds"
        )

    def finished(self, slots: Iterable[Slot]) -> bool:
        """Whether no epoch is left to propose; starts the next one when the last one's slots have finished."""
        if self._proposals or self.running:
            return False
        ours = [slot for slot in slots if slot.source.kind is OriginKind.DESCENT]
        epoch = 1 + max((slot.source.epoch for slot in ours), default=-1)
        if epoch >= self._plan.epochs:
            return all(slot.state.finished for slot in ours)
        if all(slot.state.finished for slot in ours):
            best = best_slot(list(slots))
            if best is None or best.sparsities is None:
                return True
            self._epoch, self._start = epoch, best.sparsities
            self._ends, self._attempts, self._lost = {}, Counter(), LostCalls(self._pool, self._max_attempts)
            self._begin()
        return False

    def _begin(self) -> None:
        """Let all chains of the epoch wait: whole, or divided where more workers than chains have something to do."""
        chains, plan = range(len(self._plan.steps)), self._plan
        shape, protocol = self._budget.shape, plan.data.protocol
        self._divided = {}
        n = min(plan.per_round, len(plan.data.tokens))
        if self._pool.n_parallel > len(chains) and worth_dividing(self._pool, n, shape, protocol):
            gpu = self._pool.gpus_per_worker > 0
            self._divided = {chain: DividedDescent(**self._arguments(chain), gpu=gpu) for chain in chains}
        self._waiting = deque(task for chain in chains for task in self._tasks(chain))

    def _tasks(self, chain: int) -> list[_Task]:
        """What a chain's next round, or all of it, is."""
        divided = self._divided.get(chain)
        return [_Task(chain)] if divided is None else [_Task(chain, divided.rounds, p) for p in range(divided.n_parts)]

    def _arguments(self, chain: int) -> dict[str, Any]:
        plan = self._plan
        if self._data is None:
            self._data = self._pool.share(plan.data)
        return {
            "data": self._data,
            "histograms": self._histograms,
            "start": self._start,
            "budget": self._budget,
            "options": plan.options.in_epoch(self._epoch, plan.steps[chain]),
            "per_round": plan.per_round,
            "seed": chain_seed(self._seed, self._epoch, chain),
        }

    def _call(self, task: _Task) -> Call[Any]:
        divided = self._divided.get(task.chain)
        return Descend(**self._arguments(task.chain)) if divided is None else divided.call(task.part)

    def hand_out(self) -> bool:
        """Give waiting chains to idle workers; returns whether any was given."""
        waiting = len(self._waiting)
        while self._waiting and self._pool.n_idle:
            task = self._lost.next_for(self._pool.next_index, self._waiting)
            self._attempts[task] += 1
            call, ids = self._call(task), self._ids(task)
            about = {**bound_fields(), **ids, "worker": self._pool.next_idle}
            ticket = self._pool.submit(call, deadline_seconds=self._deadline, about=about)
            self._running[ticket] = task, self._work(call)
            event(_logger, "descent handed out", **ids, worker=about["worker"])
        return len(self._waiting) < waiting

    def abandon(self) -> bool:
        """Give up the chains that have not ended; returns whether any is on a worker, whose call the caller must end.

        A later run of the study descends from the same vector again.
        """
        on_workers = bool(self._running)
        self._running.clear()
        self._waiting.clear()
        return on_workers

    def owns(self, ticket: int) -> bool:
        return ticket in self._running

    @property
    def in_flight(self) -> dict[int, Work]:
        """Work of the chains on workers, by ticket."""
        return {ticket: work for ticket, (_, work) in self._running.items()}

    def settle(self, outcome: Outcome) -> BaseException | None:
        """Take in what a chain, or a part of its round, ended with; returns an error that ends the search."""
        task, work = self._running.pop(outcome.ticket)
        error = outcome.error
        if error is None:
            event(_logger, "descent ended", **self._ids(task), worker=outcome.worker, seconds=outcome.seconds)
            self._pool.health.answered(outcome.index, outcome.seconds, work)
            return self._take(task, outcome.value)
        if not outcome.lost and not isinstance(error, TransientError):
            return error
        reason = f"{type(error).__name__}: {error}"
        if self._lost.lost(task, outcome, reason):
            times = self._lost.count(task)
            return TransientError(f"a descent was lost {times} times, last on {outcome.worker}: {error}")
        event(_logger, "descent put back", **self._ids(task), worker=outcome.worker, reason=reason)
        self._waiting.append(task)
        return None

    def _take(self, task: _Task, value: Any) -> BaseException | None:
        chain, divided, end = task.chain, self._divided.get(task.chain), value
        if divided is not None:
            try:
                if not divided.take(task.part, value):
                    return None
            except InfeasibleError as error:
                return error
            if (end := divided.end) is None:
                self._waiting.extend(self._tasks(chain))
                return None
        self._ends[chain] = end
        if len(self._ends) == len(self._plan.steps):
            self._conclude()
        return None

    def _work(self, call: Call[Any]) -> Work:
        return Work(call.words, float(self._plan.tokens)) if isinstance(call, Descend) else call.work

    def _ids(self, task: _Task) -> dict[str, Any]:
        ids = {"phase": "descent", "epoch": self._epoch, "chain": task.chain, "attempt": self._attempts[task]}
        return ids if task.chain not in self._divided else {**ids, "round": task.round, "part": task.part}

    def next_proposal(self) -> tuple[Origin, FloatArray] | None:
        """Origin and sparsities [L, 7] of the next vector to evaluate, None if there is none at present."""
        return self._proposals.popleft() if self._proposals else None

    def _conclude(self) -> None:
        ends = [self._ends[chain] for chain in range(len(self._plan.steps))]
        if len(ends) > 1:
            # The mean comes first: with fewer slots than vectors it is the one to keep.
            mean = self._budget.onto(np.mean(ends, axis=0), HIGHEST_DESCENDED)
            self._proposals.append((Origin.descent(self._epoch, None), mean))
        self._proposals.extend((Origin.descent(self._epoch, chain), end) for chain, end in enumerate(ends))
