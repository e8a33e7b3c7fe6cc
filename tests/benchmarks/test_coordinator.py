"""The coordinator's benchmark on a case of seconds: the real loop, session and Postgres."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

from benchmarks.coordinator import Case, main, measure, summary
from benchmarks.harness.coordinator_study import STUDY, make_history
from benchmarks.harness.rows import read_rows
from benchmarks.harness.virtual_pool import VirtualPool, Window
from was_search.coordinator.calls import Held
from was_search.coordinator.model_calls import Evaluate
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer
from was_storage.studies.store import StudyStore

VECTOR = np.full((32, 7), 0.6)
CALL = Evaluate(Held(None), Held(None), VECTOR)


def test_cases_are_parsed() -> None:
    assert Case.parse("64x10:1000", 0.0) == Case(64, 10.0, 1000, 30.0)
    assert Case.parse("stock:8x0.5:100", 7.0) == Case(8, 0.5, 100, 7.0, stock=True)
    assert Case.parse("8x0:100", 0.0).window == 20.0


def test_a_worker_is_idle_from_its_calls_end_to_its_next_call() -> None:
    """Two workers; one waits 0.2 s for its second call, the other until the window closes."""
    pool = VirtualPool(2, 0.1)
    assert pool.wait(0.01) == []
    pool.window = Window(time.monotonic())
    pool.submit(CALL)
    pool.submit(CALL)
    assert pool.n_idle == 0
    begin = time.monotonic()
    ended: list[object] = []
    while len(ended) < 2:
        ended += pool.wait(1.0)
    assert time.monotonic() - begin >= 0.08
    time.sleep(0.2)
    submitted = time.monotonic()
    pool.submit(CALL)
    window = pool.close_window()
    slack = 0.05 + time.monotonic() - submitted  # a busy machine may stop here
    assert len(window.gaps) == 1
    assert window.gaps[0] >= 0.2
    assert window.idle == pytest.approx(2 * window.gaps[0], abs=slack)  # the ends lie up to 0.04 s apart
    assert window.ended == 2
    assert len(pool.wait(0.0)) == 1  # closing ends what is in flight


@pytest.mark.postgres
def test_the_history_is_a_study_like_any_other(database: Database) -> None:
    make_history(database, 205)
    slots = StudyStore(database).slots(STUDY)
    assert all(slot.state is (SlotState.STOPPED if slot.number % 3 == 2 else SlotState.COMPLETE) for slot in slots)
    trials = optuna.load_study(study_name=STUDY, storage=database.optuna_storage()).trials
    assert [trial.number for trial in trials] == [slot.number for slot in slots] == list(range(205))
    assert len({tuple(trial.params.values()) for trial in trials}) == 205
    with StudyStore(database).coordinate(STUDY) as session:
        assert session.repaired == 0


@pytest.mark.postgres
@pytest.mark.parametrize("words", ["8x0.5:40", "8x0:40", "stock:2x0.5:40"])
def test_a_tiny_case(postgres_server: EmbeddedServer, words: str) -> None:
    case = Case.parse(words, 2.0)
    row = json.loads(json.dumps(measure(postgres_server, case)))
    assert row["trials"] > 0
    assert row["trials_per_second"] == pytest.approx(row["trials"] / row["window_seconds"])
    assert 0 < row["connections"] <= 10
    if case.seconds:
        assert 0.0 < row["busy"] < 1.0
    if not case.stock:
        assert row["statements_per_trial"] < 40
        assert 0 < row["resume_seconds"] < 120
        assert row["peak_rss_mib"] > 50
    table = summary([{**row, "label": "here"}]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "| here" in table[-1]


def test_the_summary_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--summary", "--output", str(tmp_path / "none.jsonl")])
    assert "busy" in capsys.readouterr().out
    assert read_rows(tmp_path / "none.jsonl") == []
