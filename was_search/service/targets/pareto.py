"""Perplexity against achieved sparsity over several targets: which points are dominated, and the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from was_search.process.plain_json import finite

METHODS = {"best": ("best of the search", "#c0392b"), "uniform": ("uniform", "#999999")}
"""Methods of the figure: their names in the legend, and colours."""

ALIKE = 0.001
"""Achieved sparsities that differ by no more than this are taken as equal."""


@dataclass(frozen=True)
class Point:
    """One plan on the test split.

    Attributes:
        method: ``best`` or ``uniform``.
        target: its budget.
        achieved: counted sparsity on the split, in [0, 1].
        perplexity: on the split.
        words: its target in words; "" for the sparsity in percent.
        predicted_ms: predicted time of a decoding step; None where no profile is known.
        distance: from the dense model's predictions, in words; "" where it is not known.
    """

    method: str
    target: float
    achieved: float
    perplexity: float
    words: str = ""
    predicted_ms: float | None = None
    distance: str = ""

    @property
    def label(self) -> str:
        """The point's label in the figure."""
        step = "" if self.predicted_ms is None else f", {self.predicted_ms:.3f} ms a step predicted"
        distance = f", {self.distance}" if self.distance else ""
        return f"target {self.words or f'{100 * self.target:g} %'}{step}{distance}"


def dominated(points: Sequence[Point]) -> list[bool]:
    """For each point, whether another one drops as much at less perplexity, or more at no more perplexity.

    Sparsities within :data:`ALIKE` count as equal: thresholds are re-taken to 0.05 percentage points on another
    split, so a hair more sparsity would save every point.
    """
    return [
        any(
            (other.perplexity < point.perplexity and other.achieved >= point.achieved - ALIKE)
            or (other.perplexity == point.perplexity and other.achieved > point.achieved + ALIKE)
            for other in points
        )
        for point in points
    ]


def pareto_figure(points: Sequence[Point], dense_perplexity: float, protocol: str) -> Any:
    """Perplexity against achieved sparsity by method, the dense model as a line; a plotly Figure.

    Dominated points are hollow. ``protocol`` is the one line that says what the figures are of. A perplexity that is
    beyond every number has no point; the title counts them.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    lesser = dominated(points)
    for method, (label, colour) in METHODS.items():
        mine = [(p, bad) for p, bad in zip(points, lesser, strict=True) if p.method == method]
        mine.sort(key=lambda item: (item[0].achieved, item[0].perplexity))
        figure.add_scatter(
            x=[round(100 * p.achieved, 3) for p, _ in mine],
            y=finite([round(p.perplexity, 5) for p, _ in mine]),
            text=[f"{p.label}{', dominated' if bad else ''}" for p, bad in mine],
            name=label,
            mode="lines+markers",
            line={"color": colour, "dash": "dot" if method == "uniform" else "solid"},
            marker={"symbol": ["circle-open" if bad else "circle" for _, bad in mine], "size": 9},
        )
    if math.isfinite(dense_perplexity):
        figure.add_hline(y=dense_perplexity, line_dash="dash", annotation_text=f"dense {dense_perplexity:.3f}")
    lost = sum(not math.isfinite(value) for value in (dense_perplexity, *(point.perplexity for point in points)))
    left_out = f"; {lost} that are no finite number are left out" if lost else ""
    figure.update_layout(
        title=f"Perplexity against achieved sparsity{left_out}<br><sub>{protocol}</sub>",
        xaxis_title="achieved sparsity of the seven projections, %",
        yaxis_title="perplexity",
        template="plotly_white",
    )
    return figure
