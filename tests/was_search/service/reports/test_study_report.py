from __future__ import annotations

import copy
import math

import pytest

from was_search.masks.intervals import Interval
from was_search.service.reports.study_report import GAP_MEANING, gap_nats, increase, interval_json, note_lines
from was_search.texts.protocol import perplexity

REPORT = {
    "exported": {
        "candidate": "best (slot 7)",
        "slot": 7,
        "best_slot": 7,
        "achieved": {"calibration": 0.6, "search": 0.598, "test": 0.6012},
    },
    "metrics": {
        "search": {"loss_nats": 2.3, "perplexity": math.exp(2.3)},
        "test": {"loss_nats": 2.4, "perplexity": math.exp(2.4)},
        "dense": {
            "search": {"loss_nats": 2.2, "perplexity": math.exp(2.2)},
            "test": {"loss_nats": 2.25, "perplexity": math.exp(2.25)},
        },
    },
    "gap_nats": -0.05,
}
COMPARED = {
    "name": "best (slot 7)",
    "test_against_uniform": {"mean": -0.2, "low": -0.25, "high": -0.15},
    "test_against_fisher_seed": {"mean": 0.001, "low": -0.002, "high": 0.004},
}


def test_overfitting_to_the_search_text_is_a_negative_gap() -> None:
    # costs 0.1 on the text that it was searched on and 0.15 on another, where dense differs too
    assert gap_nats(2.3, 2.2, 2.4, 2.25) == pytest.approx(-0.05)
    assert gap_nats(2.2, 2.2, 2.25, 2.25) == 0.0


def test_increase_is_a_ratio_of_perplexities() -> None:
    assert increase(2.3, 2.2) == pytest.approx(math.exp(2.3) / math.exp(2.2) - 1, rel=1e-12)
    assert increase(2.1, 2.2) < 0.0
    assert increase(5000.0, 2.0) == math.inf


def test_interval_as_json() -> None:
    assert interval_json(Interval(0.1, 0.0, 0.2)) == {"mean": 0.1, "low": 0.0, "high": 0.2}
    assert interval_json(None) is None


def test_the_note_shows_both_splits_and_what_the_gap_means() -> None:
    found = "\n".join(note_lines({**REPORT, "comparison": [{"name": "dense"}, COMPARED]}))
    assert "Achieved sparsity: calibration 60.00 %, search 59.80 %, test 60.12 %." in found
    assert "| search | 2.3000 | 9.974 | 9.025 | +10.52 % |" in found
    assert "| test | 2.4000 | 11.023 | 9.488 | +16.18 % |" in found
    assert "Gap -0.0500." in found
    assert GAP_MEANING[1:] in found
    assert "difference to uniform: -0.2000, 95 % interval [-0.2500, -0.1500]" in found
    assert "difference to the Fisher seed: +0.0010, 95 % interval [-0.0020, +0.0040]" in found


def test_the_note_says_how_far_predictions_are_from_the_dense_models() -> None:
    report = copy.deepcopy(REPORT)
    assert "total variation" not in "\n".join(note_lines(report))  # of a study that an older version exported
    report["metrics"]["test"] |= {"flip_rate": 0.12345, "total_variation": 0.0987}
    found = "\n".join(note_lines(report))
    words = "12.3 % of greedy next tokens are not the dense model's, total variation 0.099"
    assert f"Test split: {words}. Flips: share of tokens" in found
    report["metrics"]["test"] |= {"flip_rate": None, "total_variation": None}
    assert "nan % of greedy next tokens" in "\n".join(note_lines(report))


def test_a_note_before_the_comparison_has_no_intervals() -> None:
    found = "\n".join(note_lines(REPORT))
    assert "Gap" in found
    assert "interval" not in found


def test_an_exported_seed_has_no_interval_to_itself() -> None:
    row = copy.deepcopy(COMPARED)
    row["test_against_fisher_seed"] = {"mean": 0.0, "low": 0.0, "high": 0.0}
    found = "\n".join(note_lines({**REPORT, "comparison": [row]}))
    assert "uniform" in found
    assert "the Fisher seed" not in found


@pytest.mark.parametrize("report", [{}, {"exported": {}, "metrics": {}}])
def test_nothing_before_the_first_export(report) -> None:
    assert note_lines(report) == []


@pytest.mark.parametrize(("dense", "mine"), [(650.0, 720.0), (705.0, 1500.0), (2.0, None), (None, None)])
def test_a_report_of_figures_that_are_not_finite_is_written(dense, mine) -> None:
    """As the database gives it back: perplexities over 700 nats and losses that are no number are null."""
    report = copy.deepcopy(REPORT)
    for split in ("search", "test"):
        report["metrics"][split] = {"loss_nats": mine, "perplexity": None}
        report["metrics"]["dense"][split] = {"loss_nats": dense, "perplexity": None}
    report["gap_nats"] = None
    broken = {**COMPARED, "test_against_uniform": {"mean": None, "low": None, "high": None}}
    found = "\n".join(note_lines({**report, "comparison": [broken]}))
    assert ("| inf | inf |" in found) is (dense == 705.0)
    assert "Gap +nan." in found and "to uniform" not in found
    assert "difference to the Fisher seed: +0.0010" in found


def test_no_number_is_neither_much_nor_little() -> None:
    assert math.isnan(increase(math.nan, 2.0)) and math.isnan(increase(math.inf, math.inf))
    assert increase(math.inf, 2.0) == math.inf and increase(2.0, math.inf) == -1.0
    assert math.isnan(perplexity(math.nan)) and perplexity(700.0) == perplexity(math.inf) == math.inf
