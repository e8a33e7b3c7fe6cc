"""What the coordinator writes about slots, several at a time: vectors handed out, and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
from optuna.distributions import BaseDistribution

from was_search.studies.slots import SlotState


@dataclass(frozen=True)
class Proposal:
    """A vector for a slot that has none.

    Attributes:
        origin: where the vector comes from, as text: :class:`was_search.studies.origin.Origin`.
        params: raw suggestion by parameter name.
        distributions: distributions of the same names.
        levels: the projected vector, [L].
        sparsities: nominal, [L, 7].
        attrs: further user attributes of the trial.
    """

    origin: str
    params: Mapping[str, float]
    distributions: Mapping[str, BaseDistribution]
    levels: npt.ArrayLike
    sparsities: npt.ArrayLike
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HandOut:
    """A waiting slot for a worker; ``proposal`` is its vector, None where it has one already."""

    number: int
    worker: str
    proposal: Proposal | None = None


@dataclass(frozen=True)
class Result:
    """How an attempt at a slot ended.

    Attributes:
        number: the slot's.
        attempt: the number that its hand-out gave.
        state: COMPLETE, STOPPED or FAILED.
        losses: the study's fitness, mean nats per token of each sequence seen, [n].
        loss_nats: their mean; computed where None.
        nll_nats: mean NLL per token of the same sequences.
        tokens: predicted tokens evaluated.
        seconds: time of this attempt.
        achieved: counted sparsity, in [0, 1].
        worker: who evaluated it.
        error: why it failed.
        attrs: further user attributes of the trial.
    """

    number: int
    attempt: int
    state: SlotState
    losses: npt.ArrayLike | None = None
    loss_nats: float | None = None
    nll_nats: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    achieved: float | None = None
    worker: str = ""
    error: str = ""
    attrs: Mapping[str, Any] | None = None
