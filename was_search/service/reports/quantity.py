"""What a figure's axis of losses shows: perplexity where it is a number, else the loss itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from was_search.studies.fitness import FitnessName
from was_search.texts.protocol import perplexity


@dataclass(frozen=True)
class Quantity:
    """The quantity of an axis; ``words`` is the axis' title."""

    kind: Literal["perplexity", "loss", "kl"]

    @classmethod
    def of(cls, losses: Iterable[float | None], fitness: FitnessName = "nll") -> Quantity:
        """The quantity for ``losses``, nats per token: perplexity unless that of a finite one overflows."""
        if fitness == "kl":
            return cls("kl")
        finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        return cls("perplexity" if all(math.isfinite(perplexity(loss)) for loss in finite) else "loss")

    @property
    def words(self) -> str:
        names = {"perplexity": "perplexity", "loss": "nats per token", "kl": "KL to the dense model, nats per token"}
        return names[self.kind]

    def shown(self, loss_nats: float | None) -> float | None:
        """The height of a loss on the axis; None for one that is missing or not finite, which has no point."""
        if loss_nats is None or not math.isfinite(loss_nats):
            return None
        return round(perplexity(loss_nats) if self.kind == "perplexity" else loss_nats, 5)
