"""What a method has spent, and what it had found by then: the one way in which methods are charged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from was_search.masks.early_stop import StopRule
from was_search.shape import FloatArray, IntArray, ModelShape

STOP_EVERY = 8
"""Sequences between two early-stopping tests, as with a batch size of 8."""

LossesOf = Callable[[list[tuple[FloatArray, IntArray]]], list[FloatArray]]
"""An evaluator: each (sparsities [L, 7], indices of sequences [n]) -> mean nats per predicted token, float64 [n]."""


class Exhausted(Exception):  # noqa: N818 - the ordinary end of a method, not a failure
    """The tokens do not suffice for what was asked; nothing of it was done."""


class OutOfTime(Exception):  # noqa: N818
    """The deadline has passed: the run is dropped, to be repeated another time."""


@dataclass(frozen=True)
class Score:
    """The losses of a vector that are known so far.

    Attributes:
        sparsities: float64 [L, 7].
        losses: float64 [n], NaN for sequences not seen.
        seen: bool [n].
        stopped: whether the evaluation was stopped early.
    """

    sparsities: FloatArray
    losses: FloatArray
    seen: npt.NDArray[np.bool_]
    stopped: bool = False

    @property
    def full(self) -> bool:
        return bool(self.seen.all())

    @property
    def loss_nats(self) -> float:
        """Mean over the sequences seen; inf where one of them is not finite."""
        mean = float(self.losses[self.seen].mean())
        return mean if np.isfinite(mean) else float("inf")


@dataclass(frozen=True)
class Incumbent:
    """The best vector evaluated in full, once ``tokens`` were spent."""

    tokens: int
    loss_nats: float
    sparsities: FloatArray


class Ledger:
    """Evaluates vectors and charges for them, until the budget of tokens is spent.

    A token is charged each time it is read by a forward pass of the whole model, in full sequences. Methods that do
    something else with tokens, such as backward passes, say so with :meth:`spend`. Only a vector evaluated on all
    sequences can become the incumbent. A vector off the budget of sparsity is refused.

    Args:
        losses_of: the evaluator.
        shape: the model's.
        target: parameter-weighted mean that every vector must have.
        n_sequences: sequences of the search split.
        tokens_per_sequence: tokens of one sequence.
        evaluations: the budget, in full evaluations.
        deadline: ``time.time()`` after which :class:`OutOfTime` is raised.
    """

    def __init__(
        self,
        losses_of: LossesOf,
        shape: ModelShape,
        target: float,
        *,
        n_sequences: int,
        tokens_per_sequence: int,
        evaluations: float,
        deadline: float = float("inf"),
    ) -> None:
        self._losses_of = losses_of
        self._shape = shape
        self._target = target
        self._deadline = deadline
        self.n_sequences = n_sequences
        self.tokens_per_sequence = tokens_per_sequence
        self.budget = round(evaluations * self.tokens_per_evaluation)
        self.spent = 0
        self.n_full = 0
        self.incumbents: list[Incumbent] = []

    @property
    def tokens_per_evaluation(self) -> int:
        """Tokens of one full evaluation: the unit in which budgets and checkpoints are given."""
        return self.n_sequences * self.tokens_per_sequence

    @property
    def left(self) -> int:
        return self.budget - self.spent

    def spend(self, tokens: int) -> None:
        """Charge for work other than evaluations.

        Raises:
            Exhausted: before anything is charged.
            OutOfTime: the deadline has passed.
        """
        if tokens < 0:
            raise ValueError(f"tokens: must not be negative, got {tokens}")
        if time.time() > self._deadline:
            raise OutOfTime
        if tokens > self.left:
            raise Exhausted
        self.spent += tokens

    def evaluate(
        self,
        sparsities: FloatArray,
        sequences: int | IntArray | None = None,
        *,
        before: Score | None = None,
        rule: StopRule | None = None,
    ) -> Score:
        """Losses of ``sparsities`` [L, 7] on sequences of the search split.

        Args:
            sparsities: on the budget.
            sequences: indices, or how many of the first; None is all.
            before: an earlier, partial score of the same vector; what it has seen is not evaluated again.
            rule: asked every few sequences whether to stop; what was not evaluated is not charged. Its incumbent
                is in the order of ``sequences``.

        Raises:
            Exhausted: the tokens left do not suffice; nothing was evaluated.
            OutOfTime: the deadline has passed.
            ValueError: a vector off the budget.
        """
        wanted = np.arange(self.n_sequences)[slice(sequences) if isinstance(sequences, int | None) else sequences]
        losses, seen = self._known(sparsities, before)
        todo = wanted[~seen[wanted]]
        if len(todo) * self.tokens_per_sequence > self.left:
            raise Exhausted
        step, stopped = (max(len(todo), 1) if rule is None else STOP_EVERY), False
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            self.spend(len(part) * self.tokens_per_sequence)
            losses[part] = self._losses_of([(sparsities, part)])[0]
            seen[part] = True
            if rule is not None and start + step < len(todo) and rule.stops(losses[wanted[seen[wanted]]]):
                stopped = True
                break
        score = Score(np.array(sparsities, np.float64), losses, seen, stopped)
        if score.full and len(todo):
            self._book(score)
        return score

    def evaluate_many(self, asked: list[tuple[FloatArray, Score | None]], sequences: IntArray) -> list[Score]:
        """Do as :meth:`evaluate` for each (sparsities, before) in turn, on the same ``sequences``, in one call."""
        known = [self._known(sparsities, before) for sparsities, before in asked]
        todo = [sequences[~seen[sequences]] for _, seen in known]
        if sum(map(len, todo)) * self.tokens_per_sequence > self.left:
            return [self.evaluate(sparsities, sequences, before=before) for sparsities, before in asked]
        found = self._losses_of([(sparsities, part) for (sparsities, _), part in zip(asked, todo, strict=True)])
        scores = []
        for (sparsities, _), (losses, seen), part, new in zip(asked, known, todo, found, strict=True):
            self.spend(len(part) * self.tokens_per_sequence)
            losses[part], seen[part] = new, True
            scores.append(Score(np.array(sparsities, np.float64), losses, seen))
            if scores[-1].full and len(part):
                self._book(scores[-1])
        return scores

    def _known(self, sparsities: FloatArray, before: Score | None) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
        """Losses and what was seen, to be filled in; refuses a vector off the budget."""
        off = self._shape.sparsity(sparsities) - self._target
        if not abs(off) <= 1e-9:
            raise ValueError(f"sparsities: must meet the target {self._target}, off by {off:.3g}")
        if before is None:
            return np.full(self.n_sequences, np.nan), np.zeros(self.n_sequences, bool)
        return before.losses.copy(), before.seen.copy()

    def at(self, tokens: int) -> Incumbent | None:
        """The incumbent once ``tokens`` were spent; None before the first full evaluation."""
        found = [incumbent for incumbent in self.incumbents if incumbent.tokens <= tokens]
        return found[-1] if found else None

    def _book(self, score: Score) -> None:
        self.n_full += 1
        best = self.incumbents[-1].loss_nats if self.incumbents else float("inf")
        if score.loss_nats < best:
            self.incumbents.append(Incumbent(self.spent, score.loss_nats, score.sparsities))
