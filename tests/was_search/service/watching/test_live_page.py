"""A study's page while its search runs: the real loop, session and Postgres, a pool in memory, and no Ray."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna_dashboard import get_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from tests.doubles.loop_doubles import SHAPE, evaluation, search_options, seeds, two_workers
from was_search.coordinator.loop import SearchLoop
from was_search.errors import ModelError, StudyError
from was_search.service.reports.page import StudyPage
from was_search.service.watching.live_page import LivePage, kept_fresh
from was_search.service.watching.run_record import Run
from was_search.studies.control import LAST_SLOT, EndingKind
from was_search.studies.slots import SlotState
from was_storage.dashboard.study_page import annotate
from was_storage.server.database import Database
from was_storage.studies.control import ControlSession
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyRecord, StudyStore

pytestmark = pytest.mark.postgres

PAGE = StudyPage(
    study="searched",
    target=0.6,
    fitness="nll",
    kl_top_k=64,
    protocol="text [search]",
    seeds={"uniform": np.full(3, 0.6)},
    sensitivity=np.full((3, 7), 1e-3),
    settings={},
)


@pytest.fixture
def record(database: Database, request: pytest.FixtureRequest) -> StudyRecord:
    name = request.node.name
    identity = {"model": "none"}
    return StudyStore(database).open_or_create(name, identity=identity, config={}, shape=SHAPE.to_json(), n_slots=12)


@pytest.fixture
def shown(database: Database, record: StudyRecord) -> Callable[[], tuple[str, int]]:
    """The note, and how many evaluations the progress plot shows; "" and 0 before there are any."""

    def look() -> tuple[str, int]:
        study = optuna.load_study(study_name=record.name, storage=database.optuna_storage())
        plots = get_plotly_graph_objects(study._storage.get_study_system_attrs(study._study_id))
        if "progress" not in plots:
            return get_note(study), 0
        traces = json.loads(plots["progress"])["data"]
        return get_note(study), sum(len(t["x"]) for t in traces if t["name"].startswith(("complete", "stopped early")))

    return look


def search(
    database: Database,
    session: CoordinatorSession,
    each: Callable[[int], Any],
    drain: threading.Event | None = None,
) -> Run:
    """A search whose page is refreshed again after 50 ms; ``each(call)`` is called in every evaluation.

    A usual page's pause would be ten times as long as its last refresh, or longer: minutes on a busy machine.
    """

    def answer(call: int, sparsities: np.ndarray, rule: Any) -> Any:
        each(call)
        return evaluation(sparsities)

    run = Run(ControlSession(database, session), LAST_SLOT)
    live = LivePage(session, PAGE, session.slots(), {})
    with kept_fresh(live, run, least_seconds=0.05, share=math.inf) as refresher:
        loop = SearchLoop(
            session,
            two_workers(answer),
            "tokens",
            "histograms",
            shape=SHAPE,
            seeds=seeds(),
            options=search_options(sampler="random", early_stopping=False),
            drain=drain or threading.Event(),
            progress=lambda state: live.update(state) and refresher.changed(),
        )
        loop.run()
        run.ending = loop.ending
    return run


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_search_in_progress_shows_the_trials_so_far(database, record, shown) -> None:
    seen: list[int] = []

    def each(call: int) -> None:
        if call in (4, 8):
            until(lambda: shown()[1] >= call - 1)  # two are in flight
            note, n = shown()
            seen.append(n)
            assert "**running, workers: 2 ready**" in note
            assert f"{n} of 12 trials have finished" in note

    with StudyStore(database).coordinate(record.name) as session:
        search(database, session, each)
        note, n = shown()
        assert n == 12
        assert "**finished**. 12 of 12 trials have finished: 12 complete" in note
    assert seen == sorted(seen)
    assert seen[0] < 12


def test_what_ends_a_search_is_on_its_page(database, record, shown) -> None:
    drain = threading.Event()
    with StudyStore(database).coordinate(record.name) as session:
        ended = search(database, session, lambda call: call == 5 and drain.set(), drain)
        assert ended.ending.kind is EndingKind.DRAINED
        note, n = shown()
    assert "**drained: interrupted**" in note
    assert n == sum(slot.state.finished for slot in StudyStore(database).slots(record.name)) < 12

    def fail(call: int) -> None:
        raise ModelError("a shape does not fit")

    with StudyStore(database).coordinate(record.name) as session, pytest.raises(ModelError):
        search(database, session, fail)
    note, again = shown()
    assert "**failed: a shape does not fit**" in note
    assert again == n, "trials of the run before are still there"


def test_a_coordinator_that_was_replaced_leaves_the_page_alone(database, record, shown, caplog) -> None:
    def each(call: int) -> None:
        if call == 5:
            until(lambda: shown()[1] >= 3)
            with database.begin() as connection:  # a successor, from whom the lock was lost
                connection.exec_driver_sql("UPDATE was.study SET epoch = epoch + 1 WHERE id = %s", (record.id,))
            annotate(database, record.name, note="the successor's", figures={})

    with (
        StudyStore(database).coordinate(record.name) as session,
        pytest.raises(StudyError, match="another coordinator has taken over"),
    ):
        search(database, session, each)
    assert shown()[0] == "the successor's"
    assert "could not be finished" not in caplog.text


def test_a_page_that_cannot_be_written_harms_no_search(monkeypatch, database, record, shown, caplog) -> None:
    attempts: list[int] = []

    def broken(*_: object) -> None:
        attempts.append(1)
        raise RuntimeError("no room")

    monkeypatch.setattr(CoordinatorSession, "show", broken)
    with StudyStore(database).coordinate(record.name) as session:
        run = search(database, session, lambda call: call == 9 and until(lambda: len(attempts) >= 2))
    assert run.ending is LAST_SLOT
    assert all(slot.state is SlotState.COMPLETE for slot in StudyStore(database).slots(record.name))
    assert len(attempts) >= 3
    assert caplog.text.count("optuna-dashboard cannot be brought up to date: no room") == 1
    assert caplog.text.count("optuna-dashboard could not be finished: no room") == 1
