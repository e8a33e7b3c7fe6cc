"""What a worker's log says of each call: its begin and its end or failure, with the ids that it was given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from scripts.make_random_model import make_random_model
from tests.was_search.conftest import make_data as data_of  # noqa: F401 - a fixture
from was_search.coordinator.calls import Call, Held
from was_search.coordinator.model_calls import (
    Calibrate,
    Descend,
    Evaluate,
    EvaluateThresholds,
    FindDenseTop,
    GreedyBlock,
    Price,
)
from was_search.masks.histogram import Histograms
from was_search.texts.protocol import TokenSet
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions
from was_workers.worker import Worker, WorkerSpec

TOKENS = np.random.default_rng(0).integers(0, 200, (8, 17))
IDS = {"study": "s", "phase": "p", "part": 3, "attempt": 2, "worker": "worker-1"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = make_random_model(tmp_path_factory.mktemp("worker") / "model", "tiny")
    return Worker(WorkerSpec(str(folder), "", "float32", "cpu", "l2"))


def histograms(worker: Worker, data: TokenSet) -> Held[Histograms]:
    return Held(worker.run(Calibrate(Held(data), None))[0])


def half(worker: Worker) -> Any:
    return np.full((worker.prepare().shape.n_blocks, 7), 0.5)


CALLS: dict[str, Callable[[Worker, TokenSet], Call[Any]]] = {
    "calibration pass": lambda w, data: Calibrate(Held(data), None),
    "pricing": lambda w, data: Price(data, np.full((*half(w).shape, 3), 0.1, np.float32)),
    "descent": lambda w, data: Descend(
        Held(data),
        histograms(w, data),
        half(w),
        SparsityBudget(w.prepare().shape, 0.5),
        DescentOptions(rounds=2),
        per_round=4,
        seed=0,
    ),
    "greedy table": lambda w, data: GreedyBlock(0, Held(data), histograms(w, data), 0.25),
    "dense top": lambda w, data: FindDenseTop(data, 4),
    "plan evaluation": lambda w, data: EvaluateThresholds(data, None),
    "evaluation": lambda w, data: Evaluate(Held(data), histograms(w, data), half(w)),
}


def told(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    return {record.getMessage(): record.fields for record in caplog.records if hasattr(record, "fields")}


@pytest.mark.parametrize("what", CALLS)
def test_begin_and_end_have_the_calls_ids(worker: Worker, data_of, what: str, caplog) -> None:  # noqa: F811
    data: TokenSet = data_of(TOKENS)
    call = CALLS[what](worker, data)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="was_workers.worker"):
        worker.run(call, IDS)
    found = told(caplog)
    assert found[f"{what} begun"].items() >= IDS.items()
    assert found[f"{what} ended"].items() >= IDS.items()
    assert found[f"{what} ended"]["seconds"] > 0.0


def test_an_evaluation_tells_its_figures(worker: Worker, data_of, caplog) -> None:  # noqa: F811
    with caplog.at_level(logging.INFO, logger="was_workers.worker"):
        found = worker.run(EvaluateThresholds(data_of(TOKENS), None), IDS)
    line = told(caplog)["plan evaluation ended"]
    assert (line["loss_nats"], line["tokens"], line["stopped_early"]) == (found.loss_nats, found.tokens, False)
    assert line["seconds"] == found.seconds


def test_a_failure_is_a_warning_with_the_ids_and_the_reason(worker: Worker, data_of, caplog) -> None:  # noqa: F811
    call = Calibrate(Held(data_of(TOKENS + 10**6)), None)
    with caplog.at_level(logging.INFO, logger="was_workers.worker"), pytest.raises(IndexError):
        worker.run(call, IDS)
    (record,) = [record for record in caplog.records if record.getMessage() == "calibration pass failed"]
    assert record.levelno == logging.WARNING
    assert record.fields.items() >= IDS.items()
    assert record.fields["error"].startswith("IndexError")
    assert "calibration pass ended" not in told(caplog)


def test_nothing_is_bound_after_a_call(worker: Worker, data_of, caplog) -> None:  # noqa: F811
    call = Calibrate(Held(data_of(TOKENS)), None)
    worker.run(call, IDS)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="was_workers.worker"):
        worker.run(call)
    assert "study" not in told(caplog)["calibration pass ended"]
