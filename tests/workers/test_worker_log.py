"""What a worker's log says of each call: its begin and its end or failure, with the ids that it was given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scripts.make_random_model import make_random_model
from tests.search.conftest import make_data as data_of  # noqa: F401 - a fixture
from was_search.budget import SparsityBudget
from was_search.descent import DescentOptions
from was_search.protocol import TokenSet
from was_workers.worker import Worker, WorkerSpec

TOKENS = np.random.default_rng(0).integers(0, 200, (8, 17))
IDS = {"study": "s", "phase": "p", "part": 3, "attempt": 2, "worker": "worker-1"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = make_random_model(tmp_path_factory.mktemp("worker") / "model", "tiny")
    return Worker(WorkerSpec(str(folder), "", "float32", "cpu", "l2"))


def histograms(worker: Worker) -> Any:
    return worker.histograms(TOKENS, None, 4, 1)[0]


def half(worker: Worker) -> Any:
    return np.full((worker.prepare().shape.n_blocks, 7), 0.5)


def budget(w: Worker) -> SparsityBudget:
    return SparsityBudget(w.prepare().shape, 0.5)


CALLS: dict[str, Callable[..., Any]] = {
    "calibration pass": lambda w, data, **more: w.histograms(TOKENS, None, 4, 1, **more),
    "pricing": lambda w, data, **more: w.prices(
        TOKENS, np.full((*half(w).shape, 3), 0.1, np.float32), 4, 1, 16, **more
    ),
    "descent": lambda w, data, **more: w.descend(
        TOKENS,
        histograms(w),
        half(w),
        SparsityBudget(w.prepare().shape, 0.5),
        DescentOptions(rounds=2),
        4,
        4,
        1,
        16,
        0,
        **more,
    ),
    "greedy table": lambda w, data, **more: w.block_table(0, TOKENS, histograms(w), 4, 1, 0.25, **more),
    "dense top": lambda w, data, **more: w.dense_top(TOKENS, 4, 16, 4, **more),
    "plan evaluation": lambda w, data, **more: w.evaluate_thresholds(data, None, **more),
    "evaluation": lambda w, data, **more: w.evaluate(data, "key", histograms(w), half(w), None, None, **more),
}


def told(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    return {record.getMessage(): record.fields for record in caplog.records if hasattr(record, "fields")}


@pytest.mark.parametrize("what", CALLS)
def test_begin_and_end_have_the_calls_ids(worker: Worker, data_of, what: str, caplog) -> None:  # noqa: F811
    data: TokenSet = data_of(TOKENS)
    CALLS[what](worker, data)  # the ids are no part of the result, and the calls before its own are told here
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="was_workers.worker"):
        CALLS[what](worker, data, about=IDS)
    found = told(caplog)
    assert found[f"{what} begun"].items() >= IDS.items()
    assert found[f"{what} ended"].items() >= IDS.items()
    assert found[f"{what} ended"]["seconds"] > 0.0


def test_an_evaluation_tells_its_figures(worker: Worker, data_of, caplog) -> None:  # noqa: F811
    with caplog.at_level(logging.INFO, logger="was_workers.worker"):
        found = worker.evaluate_thresholds(data_of(TOKENS), None, about=IDS)
    line = told(caplog)["plan evaluation ended"]
    assert (line["loss_nats"], line["tokens"], line["stopped_early"]) == (found.loss_nats, found.tokens, False)
    assert line["seconds"] == found.seconds


def test_a_failure_is_a_warning_with_the_ids_and_the_reason(worker: Worker, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="was_workers.worker"), pytest.raises(IndexError):
        worker.histograms(TOKENS + 10**6, None, 4, 1, about=IDS)
    (record,) = [record for record in caplog.records if record.getMessage() == "calibration pass failed"]
    assert record.levelno == logging.WARNING
    assert record.fields.items() >= IDS.items()
    assert record.fields["error"].startswith("IndexError")
    assert "calibration pass ended" not in told(caplog)


def test_nothing_is_bound_after_a_call(worker: Worker, caplog) -> None:
    worker.histograms(TOKENS, None, 4, 1, about=IDS)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="was_workers.worker"):
        worker.histograms(TOKENS, None, 4, 1)
    assert "study" not in told(caplog)["calibration pass ended"]
