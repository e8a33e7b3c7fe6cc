"""Flips and total variation in tables: shown where they were compared, empty elsewhere."""

from __future__ import annotations

import io
import re

import numpy as np
from rich.console import Console

from was_search.masks.intervals import Interval
from was_search.service.reports.comparison import show_comparison
from was_search.service.reports.distance import DISTANCE_MEANING, distance_cells, distance_figures, distance_words
from was_search.service.reports.progress import RichReporter
from was_search.service.steps.candidates import Figures
from was_search.service.steps.comparison import Row
from was_search.texts.protocol import Distance, Evaluation


def figures(split: str, distance: Distance | None = None) -> Figures:
    losses = np.array([2.0, 2.2])
    return Figures(Evaluation(losses, 20, 1.0, False, np.zeros((3, 7)), distance=distance), split, 0.5)


DISTANCE = Distance(np.array([0.1, 0.2]), np.array([0.05, 0.1]))


def test_cells_are_means_over_sequences() -> None:
    assert distance_cells(figures("test", DISTANCE).evaluation) == ["15.0", "0.075"]
    assert distance_cells(figures("test").evaluation) == distance_figures({"loss_nats": 2.0}) == ["", ""]
    assert distance_words({}) == ""
    assert distance_figures({"flip_rate": None, "total_variation": None}) == ["nan", "nan"]  # of JSON: no number


def test_the_table_of_a_run_has_them_on_the_test_split() -> None:
    rows = [
        Row("dense", 0.0, figures("search"), figures("test"), 0.0, 0.0, None, None),
        Row("best (slot 5)", 0.6, figures("search"), figures("test", DISTANCE), 0.6, 0.01, None, None),
    ]
    reporter = RichReporter(Console(file=io.StringIO(), highlight=False, width=160))
    show_comparison(reporter, rows, "60 %", None, {})
    shown = reporter.console.file.getvalue()
    assert "│  15.0 │ 0.075 │ +0.0100 │" in shown
    assert re.search(r"│ dense .*│ 8\.166 │ +│ +│ +│", shown)
    assert f"{DISTANCE_MEANING}; on the test split" in " ".join(shown.split())


def test_a_table_of_a_run_fits_a_log_and_loses_no_figure_in_120_columns() -> None:
    interval = Interval(-0.1036, -0.1117, -0.0955)
    row = Row("greedy-uniform", 0.6, figures("search"), figures("test", DISTANCE), 0.6, 0.01, interval, interval)
    for width, lines in ((132, ["-0.1036 ±0.0081"]), (120, ["-0.1036", "±0.0081"])):
        reporter = RichReporter(Console(file=io.StringIO(), highlight=False, width=width))
        show_comparison(reporter, [row], "60 %", None, {})
        shown = reporter.console.file.getvalue()
        assert "…" not in shown
        assert [shown.count(line) for line in lines] == [2] * len(lines)
