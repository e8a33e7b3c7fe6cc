"""How far predictions are from the dense model's: flips and total variation, as every table and note shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from was_search.process.plain_json import number
from was_search.texts.protocol import Evaluation

DISTANCE_COLUMNS = ("flips\n%", "TV")
DISTANCE_MEANING = (
    "flips: share of tokens at which greedy decoding takes another next token than the dense model; "
    "TV: total variation distance of the next token's distribution from the dense model's, 0 to 1, mean per token"
)
"""What the figures mean, in words."""


def distance_cells(found: Evaluation) -> list[str]:
    """Cells for :data:`DISTANCE_COLUMNS`; empty where nothing was compared."""
    return distance_figures({} if found.distance is None else found.distance.to_json())


def distance_figures(figures: Mapping[str, Any]) -> list[str]:
    """The same from figures as JSON, of a plan's metrics or a study's report."""
    if "flip_rate" not in figures:
        return ["", ""]
    return [f"{100 * number(figures['flip_rate']):.1f}", f"{number(figures['total_variation']):.3f}"]


def distance_words(figures: Mapping[str, Any]) -> str:
    """The same in a sentence; "" where nothing was compared."""
    flips, variation = distance_figures(figures)
    return f"{flips} % of greedy next tokens are not the dense model's, total variation {variation}" if flips else ""
