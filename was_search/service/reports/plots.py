"""The figures of a study: levels of the best vector beside the seeds', losses, the workers' time, tokens saved."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from was_search.masks.early_stop import estimated_loss
from was_search.service.reports.quantity import Quantity
from was_search.shape import PROJECTIONS, FloatArray
from was_search.studies.fitness import FitnessName
from was_search.studies.origin import Origin
from was_search.studies.slots import Slot, SlotState, best_slot, tokens_saved

MAX_BARS = 1000
"""Most evaluations in the timeline, the latest ones: more make the page slow, and writing it too."""

MAX_POINTS = 2000
"""Most evaluations in other plots, spread over all of them."""

_STATES = {
    SlotState.COMPLETE: ("complete", "#2a6fbb"),
    SlotState.STOPPED: ("stopped early", "#c9a227"),
    SlotState.FAILED: ("failed", "#c0392b"),
}
_COLOURS = {"uniform": "#999999", "greedy-uniform": "#c9a227", "fisher": "#2a6fbb", "best": "#c0392b"}


def levels_figure(best: FloatArray, seeds: dict[str, FloatArray], target: float) -> Any:
    """Level of each block [L], best against the seeds; a plotly Figure."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, levels in seeds.items():
        if name == "greedy-uniform":
            continue  # its levels are those of uniform; its blocks differ inside
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


def progress_figure(
    slots: list[Slot], fitness: FitnessName = "nll", against: Literal["evaluations", "time"] = "evaluations"
) -> Any:
    """Perplexity of evaluations on the search split as they finished, with the best and the seeds'; a plotly Figure.

    Drawn against their number or, in UTC, against time, where pauses and interruptions show. With the fitness ``kl``
    the divergence itself is drawn, in nats per token, and so is a loss whose perplexity is beyond every number. Of more
    than :data:`MAX_POINTS` evaluations only those that made a new best are shown, and evenly spaced ones of the others.

    A trial that was stopped early has a mean over its first sequences alone, which may be easier than the others: it is
    drawn at the best's loss plus its difference to the best on the same sequences, and not at all before there is one.
    """
    import plotly.graph_objects as go

    done = [s for s in slots if s.state.finished and s.loss_nats is not None and math.isfinite(s.loss_nats)]
    best = best_slot(done)
    quantity = Quantity.of([s.loss_nats for s in done], fitness)
    if against == "time":
        done = [s for s in done if s.finished_at is not None]
    done.sort(key=lambda s: (s.finished_at is None, s.finished_at, s.number))

    def at(positions: list[int]) -> list[Any]:
        return [_utc(done[i].finished_at) if against == "time" else i + 1 for i in positions]

    heights = [quantity.shown(comparable_loss(s, best)) for s in done]
    records = _records(done)
    every = -(-len(done) // MAX_POINTS)
    figure = go.Figure()
    for state, label, symbol in (
        (SlotState.COMPLETE, "complete", "circle"),
        (SlotState.STOPPED, "stopped early (against the best)", "x"),
    ):
        points = [
            i
            for i, s in enumerate(done)
            if s.state is state and heights[i] is not None and (i % every == 0 or i in records)
        ]
        figure.add_scatter(
            x=at(points),
            y=[heights[i] for i in points],
            text=[f"slot {done[i].number}, {done[i].origin}{_seen(done[i])}" for i in points],
            mode="markers",
            marker={"symbol": symbol, "color": _STATES[state][1], "opacity": 0.7},
            name=label,
        )
    steps = list(records)
    figure.add_scatter(
        x=at(steps + [len(done) - 1] * bool(steps)),
        y=[heights[i] for i in steps + steps[-1:]],
        mode="lines",
        line={"shape": "hv", "color": _COLOURS["best"]},
        name="best",
    )
    for name, label in (("uniform", "uniform"), ("fisher", "fisher seed")):
        found = [s for s in done if s.source == Origin.seed(name) and s.state is SlotState.COMPLETE]
        if found:
            figure.add_scatter(
                x=at([0, len(done) - 1]),
                y=[quantity.shown(found[0].loss_nats)] * 2,
                mode="lines",
                line={"dash": "dot", "color": _COLOURS[name]},
                name=label,
            )
    over = " over time" if against == "time" else ""
    left_out = f", one in {every} of {len(done)} evaluations" if every > 1 else ""
    figure.update_layout(
        title=f"{quantity.words[0].upper()}{quantity.words[1:]} on the search split{over}{left_out}",
        xaxis={"type": "date", "title": "UTC"} if against == "time" else {"title": "evaluations"},
        yaxis_title=quantity.words,
        template="plotly_white",
    )
    return figure


def comparable_loss(slot: Slot, best: Slot | None) -> float | None:
    """A finished slot's loss over all sequences: an estimate for one that was stopped early, None without a best."""
    if slot.state is SlotState.COMPLETE:
        return slot.loss_nats
    if slot.losses is None or best is None or best.losses is None or len(slot.losses) > len(best.losses):
        return None
    return estimated_loss(slot.losses, best.losses)


def _seen(slot: Slot) -> str:
    stopped = slot.state is SlotState.STOPPED and slot.losses is not None
    return f", {len(slot.losses)} sequences" if stopped and slot.losses is not None else ""


def _records(done: list[Slot]) -> dict[int, None]:
    """Positions of the complete evaluations that were better than all before them, in their order."""
    best = math.inf
    found: dict[int, None] = {}
    for i, slot in enumerate(done):
        if slot.state is SlotState.COMPLETE and slot.loss_nats is not None and slot.loss_nats < best:
            best = slot.loss_nats
            found[i] = None
    return found


def timeline_figure(slots: list[Slot]) -> Any:
    """Which worker evaluated which slot when, as far as the slots' last attempts tell; a plotly Figure.

    The latest :data:`MAX_BARS` evaluations, in UTC.
    """
    import plotly.graph_objects as go

    done = [s for s in slots if s.state.finished and s.worker and s.started_at and s.finished_at]
    done.sort(key=lambda s: (s.finished_at, s.number))
    shown = done[-MAX_BARS:]
    figure = go.Figure()
    for state, (label, colour) in _STATES.items():
        bars = [s for s in shown if s.state is state]
        figure.add_bar(
            orientation="h",
            y=[s.worker for s in bars],
            base=[_utc(s.started_at) for s in bars],
            x=[round(1e3 * _seconds(s)) for s in bars],  # plotly counts time in milliseconds
            text=[str(s.number) for s in bars],
            customdata=[[s.origin, round(_seconds(s), 1), s.attempt] for s in bars],
            hovertemplate="slot %{text}, %{customdata[0]}<br>%{customdata[1]} s, attempt %{customdata[2]}"
            "<extra>%{y}</extra>",
            textposition="inside",
            insidetextanchor="middle",
            marker={"color": colour, "line": {"color": "white", "width": 1}},
            name=label,
        )
    workers = sorted({s.worker for s in shown}, key=lambda name: [(not p.isdigit(), p.zfill(9)) for p in _parts(name)])
    left_out = f", the last {MAX_BARS} of {len(done)} evaluations" if len(done) > MAX_BARS else ""
    figure.update_layout(
        title=f"Workers and the slots that they evaluated{left_out}",
        xaxis={"type": "date", "title": "UTC"},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": workers[::-1], "automargin": True},
        barmode="overlay",
        template="plotly_white",
    )
    return figure


def savings_figure(slots: list[Slot]) -> Any:
    """Sequences read against those that evaluating every trial in full would have read; a plotly Figure."""
    import plotly.graph_objects as go

    done = [s for s in slots if s.state in (SlotState.COMPLETE, SlotState.STOPPED) and s.losses is not None]
    done.sort(key=lambda s: (s.finished_at is None, s.finished_at, s.number))
    read = np.cumsum([0, *(0 if s.losses is None else len(s.losses) for s in done)])
    full = max((len(s.losses) for s in done if s.losses is not None), default=0) * np.arange(len(done) + 1)
    every = -(-len(read) // MAX_POINTS)
    shown = sorted({*range(0, len(read), every), len(read) - 1})
    figure = go.Figure()
    for values, name, style in (
        (full, "in full", {"line": {"dash": "dot", "color": "#999999"}}),
        (read, "read", {"line": {"color": _COLOURS["best"]}, "fill": "tonexty"}),
    ):
        figure.add_scatter(x=shown, y=values[shown].tolist(), mode="lines", name=name, **style)
    figure.update_layout(
        title=f"{100 * tokens_saved(slots):.0f} % of the tokens saved by stopping early",
        xaxis_title="evaluations",
        yaxis_title="sequences",
        template="plotly_white",
    )
    return figure


def _seconds(slot: Slot) -> float:
    """Seconds of the attempt that finished; of the evaluation alone, where that is known."""
    assert slot.started_at is not None and slot.finished_at is not None
    return max((slot.finished_at - slot.started_at).total_seconds(), 0.0)


def _utc(moment: datetime | None) -> str:
    assert moment is not None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "")


def _parts(name: str) -> list[str]:
    return re.findall(r"\d+|\D+", name)
