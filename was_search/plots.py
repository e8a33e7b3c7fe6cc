"""The figures of a study: levels of the best vector beside the seeds', and loss against evaluations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from was_search.fitness import FitnessName
from was_search.protocol import perplexity
from was_search.shape import PROJECTIONS, FloatArray
from was_search.slots import Slot, SlotState

_COLOURS = {"uniform": "#999999", "greedy-uniform": "#c9a227", "fisher": "#2a6fbb", "best": "#c0392b"}


def levels_figure(best: FloatArray, seeds: dict[str, FloatArray], target: float) -> Any:
    """Level of each block [L], best against the seeds; a plotly Figure."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, levels in seeds.items():
        if name == "greedy-uniform":
            continue  # the same flat levels as uniform; its blocks differ inside
        figure.add_scatter(
            y=np.round(levels, 4),
            name="uniform, greedy-uniform" if name == "uniform" else f"{name} seed",
            mode="lines+markers",
            line={"color": _COLOURS.get(name), "dash": "dot" if name == "uniform" else "solid"},
        )
    figure.add_scatter(
        y=np.round(best, 4), name="best", mode="lines+markers", line={"color": _COLOURS["best"], "width": 3}
    )
    figure.update_layout(
        title=f"Levels at a budget of {100 * target:g} %",
        xaxis_title="block",
        yaxis_title="level (sparsity of the block)",
        template="plotly_white",
    )
    return figure


def sensitivity_figure(sensitivity: FloatArray, sparsities: FloatArray, target: float) -> Any:
    """Heat map of what each projection costs [L, 7], millinats per percent of weights; a plotly Figure.

    Hovering shows the sparsity [L, 7] that the best vector gives the projection.
    """
    import plotly.graph_objects as go

    cost = 1e3 * sensitivity.T
    figure = go.Figure(
        go.Heatmap(
            z=np.round(np.log10(np.maximum(cost, 1e-12)), 3),
            x=list(range(cost.shape[1])),
            y=list(PROJECTIONS),
            customdata=np.dstack([np.round(cost, 4), np.round(100 * sparsities.T, 1)]),
            hovertemplate="block %{x}, %{y}<br>%{customdata[0]} millinats per 1 %<br>best: %{customdata[1]} % dropped"
            "<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "log10 of millinats<br>per 1 % of weights"},
        )
    )
    figure.update_layout(
        title=f"Price of dropping {100 * target:g} % of one projection's inputs (Fisher, dense model)",
        xaxis_title="block",
        yaxis={"autorange": "reversed"},
        template="plotly_white",
    )
    return figure


def progress_figure(slots: list[Slot], fitness: FitnessName = "nll") -> Any:
    """Perplexity on the search split against evaluations, in the order in which they finished; a plotly Figure.

    With the fitness ``kl`` the divergence itself, in nats per token.
    """
    import plotly.graph_objects as go

    def shown(loss_nats: float) -> float:
        return perplexity(loss_nats) if fitness == "nll" else loss_nats

    quantity = "perplexity" if fitness == "nll" else "KL to the dense model, nats per token"
    done = [s for s in slots if s.state.finished and s.loss_nats is not None and math.isfinite(s.loss_nats)]
    done.sort(key=lambda s: (s.finished_at is None, s.finished_at, s.number))
    figure = go.Figure()
    for state, label, symbol in (
        (SlotState.COMPLETE, "complete", "circle"),
        (SlotState.STOPPED, "stopped early (mean so far)", "x"),
    ):
        points = [(i, s) for i, s in enumerate(done) if s.state is state]
        figure.add_scatter(
            x=[i + 1 for i, _ in points],
            y=[round(shown(s.loss_nats or 0.0), 5) for _, s in points],
            text=[f"slot {s.number}, {s.origin}" for _, s in points],
            mode="markers",
            marker={"symbol": symbol},
            name=label,
        )
    best, trace = math.inf, []
    for s in done:
        if s.state is SlotState.COMPLETE and s.loss_nats is not None:
            best = min(best, shown(s.loss_nats))
        trace.append(best if math.isfinite(best) else None)
    figure.add_scatter(x=list(range(1, len(done) + 1)), y=trace, mode="lines", line={"shape": "hv"}, name="best")
    figure.update_layout(
        title=f"{quantity[0].upper()}{quantity[1:]} on the search split",
        xaxis_title="evaluations",
        yaxis_title=quantity,
        template="plotly_white",
    )
    return figure
