from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from was_search.service.reports import plots
from was_search.service.reports.plots import (
    levels_figure,
    progress_figure,
    savings_figure,
    sensitivity_figure,
    timeline_figure,
)
from was_search.studies.slots import Slot, SlotState

STOPPED = "stopped early (against the best)"
START = datetime(2025, 1, 1)


def slot(number: int, minute: int | None, loss: float | None, state: SlotState = SlotState.COMPLETE) -> Slot:
    at = None if minute is None else START + timedelta(minutes=minute)
    return Slot(number, state, origin="sampler:tpe", loss_nats=loss, finished_at=at)


def with_losses(number: int, minute: int, losses: list[float], of: int = 4) -> Slot:
    """A slot with the losses of its sequences; stopped early if they are fewer than ``of``."""
    state = SlotState.COMPLETE if len(losses) == of else SlotState.STOPPED
    return dataclasses.replace(slot(number, minute, float(np.mean(losses)), state), losses=np.asarray(losses))


def traces(figure) -> dict[str, object]:
    return {trace.name: trace for trace in figure.data}


def test_progress_runs_in_the_order_of_finishing():
    figure = progress_figure(
        [
            slot(0, 5, 2.0),
            slot(1, 1, 3.0),
            slot(2, 2, 2.5, SlotState.STOPPED),
            slot(3, 3, None, SlotState.FAILED),
            slot(4, 4, 2.2),
            slot(5, None, None, SlotState.RUNNING),
        ]
    )
    found = traces(figure)
    assert list(found["complete"].x) == [1, 3, 4]
    np.testing.assert_allclose(found["complete"].y, np.exp([3.0, 2.2, 2.0]), atol=1e-5)
    assert list(found["complete"].text) == [
        "slot 1, sampler:tpe",
        "slot 4, sampler:tpe",
        "slot 0, sampler:tpe",
    ]
    assert list(found[STOPPED].x) == []  # nothing is known of its sequences
    # A stopped trial is never the best. A step where the best changed.
    assert list(found["best"].x) == [1, 3, 4, 4]
    np.testing.assert_allclose(found["best"].y, np.exp([3.0, 2.2, 2.0, 2.0]), atol=1e-5)


BEST = [1.0, 1.2, 5.0, 5.6]
"""The best's losses: the first sequences are easy, so whoever sees them alone looks good."""


def test_a_stopped_trial_stands_against_the_best_on_the_same_sequences():
    slots = [
        with_losses(0, 1, [1.4, 1.8]),  # 0.5 worse than the best there; its mean so far is 1.6, the best's is 3.2
        with_losses(1, 2, [1.3, 1.5, 5.3, 6.1]),
        with_losses(2, 3, BEST),
        with_losses(3, 4, [1.1, 1.2, 5.2]),
    ]
    for fitness, height in (("nll", np.exp), ("kl", np.asarray)):
        found = traces(progress_figure(slots, fitness))
        assert list(found[STOPPED].x) == [1, 4]
        np.testing.assert_allclose(found[STOPPED].y, height([3.2 + 0.5, 3.2 + 0.1]), atol=1e-4)
        assert min(found[STOPPED].y) > min(found["best"].y)
    assert list(found[STOPPED].text) == ["slot 0, sampler:tpe, 2 sequences", "slot 3, sampler:tpe, 3 sequences"]


def test_without_a_best_a_stopped_trial_is_not_shown():
    assert list(traces(progress_figure([with_losses(0, 1, [1.4, 1.8])]))[STOPPED].x) == []
    longer = [with_losses(0, 1, [1.4] * 6, of=9), with_losses(1, 2, BEST)]  # no longer the same text
    assert list(traces(progress_figure(longer))[STOPPED].x) == []


def test_before_the_first_complete_trial_there_is_no_best():
    found = traces(progress_figure([slot(0, 1, 2.0, SlotState.STOPPED), slot(1, 2, 2.5)]))
    assert list(found["best"].x) == [2, 2]
    assert found["best"].y[0] == pytest.approx(math.exp(2.5), abs=1e-5)


@pytest.mark.parametrize("slots", [[], [slot(0, None, None, SlotState.WAITING)]])
def test_an_empty_study(slots):
    assert len(traces(progress_figure(slots))["best"].x) == 0


def test_slots_without_a_time_come_last_by_number():
    found = traces(progress_figure([slot(2, None, 1.2), slot(1, None, 1.1), slot(0, 9, 1.0)]))
    assert [text.split(",")[0] for text in found["complete"].text] == ["slot 0", "slot 1", "slot 2"]


def test_losses_beyond_every_perplexity():
    """The losses themselves are drawn: a figure has no place for an infinite number."""
    figure = progress_figure([slot(0, 1, 5000.0), slot(1, 2, 1.0)])
    found = traces(figure)
    assert list(found["complete"].y) == list(found["best"].y[:2]) == [5000.0, 1.0]
    assert figure.layout.yaxis.title.text == "nats per token"
    assert "Infinity" not in figure.to_json() and "NaN" not in figure.to_json()
    assert list(traces(progress_figure([slot(0, 1, math.nan)]))["complete"].y) == []


def test_a_divergence_is_shown_as_it_is():
    figure = progress_figure([slot(0, 1, 0.25), slot(1, 2, 0.2)], "kl")
    found = traces(figure)
    assert list(found["complete"].y) == [0.25, 0.2]
    assert list(found["best"].y) == [0.25, 0.2, 0.2]
    assert figure.layout.yaxis.title.text == "KL to the dense model, nats per token"
    assert progress_figure([]).layout.title.text == "Perplexity on the search split"


def seeded(number: int, minute: int, loss: float, name: str) -> Slot:
    return dataclasses.replace(slot(number, minute, loss), origin=f"seed:{name}")


def test_the_seeds_losses_are_lines_across():
    slots = [seeded(0, 1, 3.0, "uniform"), seeded(1, 2, 2.5, "fisher"), slot(2, 3, 2.4), slot(3, 9, 2.0)]
    found = traces(progress_figure(slots))
    for name, loss in (("uniform", 3.0), ("fisher seed", 2.5)):
        assert list(found[name].x) == [1, 4]
        np.testing.assert_allclose(found[name].y, np.exp([loss, loss]), atol=1e-5)
    assert "uniform" not in traces(progress_figure(slots[2:]))


def test_progress_against_time():
    slots = [slot(0, 5, 2.0), slot(1, 1, 3.0), slot(2, None, 1.0)]
    slots = [dataclasses.replace(s, finished_at=s.finished_at and s.finished_at.replace(tzinfo=UTC)) for s in slots]
    figure = progress_figure(slots, against="time")
    found = traces(figure)
    assert list(found["complete"].x) == ["2025-01-01T00:01:00.000", "2025-01-01T00:05:00.000"]
    assert list(found["best"].x) == ["2025-01-01T00:01:00.000", "2025-01-01T00:05:00.000", "2025-01-01T00:05:00.000"]
    assert figure.layout.xaxis.title.text == "UTC"
    assert figure.layout.title.text == "Perplexity on the search split over time"


def test_of_a_long_study_every_best_is_shown_and_some_of_the_others(monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 10)
    losses = [5.0 + i % 3 for i in range(95)]
    losses[33] = 1.0
    slots = [slot(i, i, loss) for i, loss in enumerate(losses)]
    figure = progress_figure(slots)
    found = traces(figure)
    assert list(found["complete"].x) == sorted([34, *range(1, 96, 10)])
    assert list(found["best"].x) == [1, 34, 95]
    assert "one in 10 of 95 evaluations" in figure.layout.title.text
    read = traces(savings_figure([dataclasses.replace(s, losses=np.ones(4)) for s in slots]))["read"]
    assert list(read.x) == [*range(0, 96, 10), 95]
    assert list(read.y) == [4 * i for i in read.x]


def test_levels_of_the_best_beside_the_seeds():
    flat = np.full(4, 0.6)
    fisher = np.array([0.4, 0.8, 0.6, 0.6])
    figure = levels_figure(fisher + 0.01, {"uniform": flat, "greedy-uniform": flat, "fisher": fisher}, 0.6)
    found = traces(figure)
    assert list(found) == ["uniform, greedy-uniform", "fisher seed", "best"]
    np.testing.assert_allclose(found["best"].y, fisher + 0.01)
    np.testing.assert_allclose(found["fisher seed"].y, fisher)
    assert "60 %" in figure.layout.title.text


def test_sensitivity_is_shown_by_block_and_projection():
    costs = np.arange(1.0, 22.0).reshape(3, 7) * 1e-4
    sparsities = np.linspace(0.2, 0.8, 21).reshape(3, 7)
    (heat,) = sensitivity_figure(costs, sparsities, 0.6).data
    assert list(heat.y) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert list(heat.x) == [0, 1, 2]
    np.testing.assert_allclose(heat.z, np.log10(1e3 * costs.T), atol=5e-4)  # rounded to three digits
    np.testing.assert_allclose(heat.customdata[..., 1], 100 * sparsities.T, atol=0.05)


def evaluated(number: int, worker: str, begun: float, ended: float, state=SlotState.COMPLETE, sequences=8) -> Slot:
    """A slot whose evaluation lay between two seconds; the database gives times with a zone."""
    start = START.replace(tzinfo=UTC)
    return Slot(
        number, state, attempt=1, origin="seed:fisher", losses=np.ones(sequences), loss_nats=1.0, worker=worker,
        started_at=start + timedelta(seconds=begun), finished_at=(start + timedelta(seconds=ended)),
    )  # fmt: skip


def test_the_timeline_has_a_bar_for_every_evaluation_on_its_workers_row():
    slots = [
        evaluated(0, "worker-10@b:5", 0, 2.5),
        evaluated(1, "worker-2@a:7", 1, 4, SlotState.STOPPED),
        evaluated(2, "worker-2@a:7", 4, 4.25, SlotState.FAILED),
        Slot(3, SlotState.RUNNING, worker="worker-2@a:7", started_at=START),
        Slot(4, SlotState.WAITING),
    ]
    figure = timeline_figure(slots)
    found = traces(figure)
    assert list(found["complete"].y) == ["worker-10@b:5"]
    assert list(found["complete"].base) == ["2025-01-01T00:00:00.000"]
    assert list(found["complete"].x) == [2500]
    assert list(found["stopped early"].text) == ["1"]
    assert (list(found["failed"].base), list(found["failed"].x)) == (["2025-01-01T00:00:04.000"], [250])
    assert list(figure.layout.yaxis.categoryarray) == ["worker-10@b:5", "worker-2@a:7"]  # from below


def test_the_timeline_is_in_utc():
    at = datetime(2025, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    slot = Slot(0, SlotState.COMPLETE, worker="w", started_at=at, finished_at=at + timedelta(seconds=1))
    assert list(traces(timeline_figure([slot]))["complete"].base) == ["2025-01-01T00:00:00.000"]


def test_a_long_timeline_shows_the_latest(monkeypatch):
    monkeypatch.setattr(plots, "MAX_BARS", 3)
    figure = timeline_figure([evaluated(n, "w", n, n + 1) for n in range(5)])
    assert list(traces(figure)["complete"].text) == ["2", "3", "4"]
    assert "the last 3 of 5 evaluations" in figure.layout.title.text


def test_savings_count_sequences_against_full_evaluations():
    slots = [
        evaluated(1, "w", 0, 2, SlotState.STOPPED, 3),
        evaluated(0, "w", 0, 1),
        Slot(2, SlotState.FAILED, worker="w"),
        Slot(3, SlotState.WAITING),
    ]
    figure = savings_figure(slots)
    found = traces(figure)
    assert list(found["read"].y) == [0, 8, 11]
    assert list(found["in full"].y) == [0, 8, 16]
    assert figure.layout.title.text == "31 % of the tokens saved by stopping early"  # 5 of 16
    assert list(traces(savings_figure([]))["read"].y) == [0]
    assert timeline_figure([]).data
