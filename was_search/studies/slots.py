"""A slot: one of the N evaluations that a study of N trials consists of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from was_search.shape import FloatArray
from was_search.studies.origin import Origin


class SlotState(StrEnum):
    """Life of a slot. It finishes exactly once: complete, stopped or failed."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        return self in (SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED)


@dataclass(frozen=True)
class Slot:
    """One row of the slot table.

    Attributes:
        number: 0 .. N-1; the seeds come first.
        state: where the slot stands.
        attempt: hand-outs so far; 0 before the first.
        origin: where the vector comes from, as text: :class:`was_search.studies.origin.Origin`; "" before one is
            chosen.
        params: the raw suggestion by Optuna parameter name, None before a vector is chosen.
        levels: the projected vector, float64 [L].
        sparsities: nominal, float64 [L, 7].
        losses: the study's fitness, mean nats per token of each sequence evaluated, float64 [n].
        loss_nats: mean of ``losses``.
        nll_nats: mean NLL per token of the same sequences, what perplexity is made of; equal to ``loss_nats`` where
            that is the fitness.
        tokens: predicted tokens evaluated.
        seconds: time of the finishing attempt.
        achieved: counted parameter-weighted sparsity of the model, a float in [0, 1].
        worker: who evaluated it.
        trial_id: Optuna's id of the trial in the same database.
        error: why it failed.
    """

    number: int
    state: SlotState
    attempt: int = 0
    origin: str = ""
    params: dict[str, float] | None = None
    levels: FloatArray | None = None
    sparsities: FloatArray | None = None
    losses: FloatArray | None = None
    loss_nats: float | None = None
    nll_nats: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    achieved: float | None = None
    worker: str = ""
    trial_id: int | None = None
    error: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def source(self) -> Origin:
        """The origin as a value."""
        return Origin.parse(self.origin)


def best_slot(slots: list[Slot]) -> Slot | None:
    """The complete slot with the least loss; stopped and failed ones are never best."""
    complete = [s for s in slots if s.state is SlotState.COMPLETE and s.loss_nats is not None]
    return min(complete, key=lambda s: (s.loss_nats, s.number), default=None)


def tokens_saved(slots: list[Slot]) -> float:
    """Share of the tokens of all evaluations that stopping early left unread, in [0, 1).

    Compared with the same trials in full; failed slots are left out.
    """
    finished = (SlotState.COMPLETE, SlotState.STOPPED)
    return share_saved([len(s.losses) for s in slots if s.losses is not None and s.state in finished])


def share_saved(seen: list[int]) -> float:
    """:func:`tokens_saved` of evaluations, from the number of sequences that each has seen."""
    return 1.0 - sum(seen) / (len(seen) * max(seen)) if seen else 0.0
