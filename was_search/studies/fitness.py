"""The two fitnesses of a search, and how their figures are put into words.

``nll``: the negative log-likelihood of the text. ``kl``: the divergence from the dense model's predictions,
:mod:`was_search.masks.divergence`. Both are nats per predicted token. Perplexity is the exponential of the NLL alone,
so every evaluation yields the NLL as well, whatever the fitness.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from was_search.texts.protocol import perplexity

FitnessName = Literal["nll", "kl"]
FITNESSES: tuple[FitnessName, ...] = get_args(FitnessName)

UNITS: dict[FitnessName, str] = {"nll": "nats", "kl": "nats of KL"}
"""Unit of a loss, in words."""


def fitness_words(fitness: FitnessName, loss_nats: float, nll_nats: float | None) -> str:
    """A loss with its unit and the perplexity that goes with it, where that is known."""
    words = f"{loss_nats:.4f} {UNITS[fitness]} per token"
    return words if nll_nats is None else f"{words}, perplexity {perplexity(nll_nats):.3f}"


def fitness_identity(fitness: FitnessName, top_k: int) -> dict[str, Any]:
    """The fitness in a study's identity; ``top_k`` matters for ``kl`` only."""
    return {"fitness": fitness if fitness == "nll" else f"{fitness}, dense top {top_k}"}


def fitness_of(identity: Mapping[str, Any]) -> FitnessName:
    """The fitness of a study with this ``identity``."""
    return "kl" if str(identity.get("fitness")).startswith("kl") else "nll"
