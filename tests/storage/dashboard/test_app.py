"""The dashboard: notes, plots and the server."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.error
import urllib.request

import optuna
import plotly.graph_objects as go
import pytest
from optuna_dashboard import get_note
from sqlalchemy import event

from tests.doubles.small_study import new_study, propose
from was_search.errors import ResourceError, StorageError, StudyError
from was_storage.dashboard import app
from was_storage.dashboard.app import open_dashboard, serve
from was_storage.dashboard.study_page import annotate
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


def test_annotating_twice_writes_once(database: Database) -> None:
    storage = database.optuna_storage()
    name = new_study(database).name
    figures = {"levels": go.Figure(go.Bar(y=list(range(2000)))), "history": go.Figure()}
    annotate(database, name, note="# Note\n" * 1000, figures=figures)
    study = optuna.load_study(study_name=name, storage=storage)
    assert get_note(study) == "# Note\n" * 1000
    writes: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *a: writes.append(str(a[2])))
    annotate(database, name, note="# Note\n" * 1000, figures=figures)
    assert not [statement for statement in writes if not statement.startswith("SELECT")]
    annotate(database, name, note="short", figures={"levels": go.Figure()})
    assert get_note(study) == "short"


def test_a_figure_without_a_note_leaves_the_note(database: Database) -> None:
    storage = database.optuna_storage()
    name = new_study(database).name
    annotate(database, name, note="kept", figures={})
    annotate(database, name, note=None, figures={"pareto": go.Figure()})
    study = optuna.load_study(study_name=name, storage=storage)
    assert get_note(study) == "kept"
    assert any("pareto" in key for key in storage.get_study_system_attrs(study._study_id))


def test_bad_annotations_are_refused(database: Database) -> None:
    with pytest.raises(StudyError, match="study 'nope' has no Optuna study"):
        annotate(database, "nope", note="", figures={})
    with pytest.raises(StudyError, match=r"figure 'a b': an id has letters"):
        annotate(database, new_study(database).name, note="", figures={"a b": go.Figure()})


def test_the_server_shows_study_trials_note_and_plots(database: Database) -> None:
    record = new_study(database)
    with StudyStore(database).coordinate(record.name) as session:
        propose(session, 0)
    annotate(database, record.name, note="hello", figures={"levels": go.Figure()})
    with open_dashboard(database, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert server.url.startswith("http://127.0.0.1:")
            base = server.url.removesuffix("/dashboard")
            with urllib.request.urlopen(server.url) as page:
                assert b"<html" in page.read().lower()
            with urllib.request.urlopen(f"{base}/api/studies/{record.optuna_study_id}") as answer:
                detail = json.load(answer)
        finally:
            server.shutdown()
            thread.join()
    assert detail["name"] == record.name
    assert len(detail["trials"]) == 1
    assert detail["note"]["body"] == "hello"
    assert [plot["graph_object"] is not None for plot in detail["plotly_graph_objects"]] == [True]


def test_a_port_that_is_taken(database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"cannot listen on 127.0.0.1:{port} .*in use.*another port"):
            serve(database, port=port, listening=lambda url: pytest.fail(f"{url} was said to be ours"))


def test_addresses_that_cannot_be(database: Database) -> None:
    with pytest.raises(ResourceError, match=r"cannot listen on host\.invalid:8080"):
        open_dashboard(database, "host.invalid")
    with pytest.raises(ResourceError, match="port must be 0 to 65535, got 70000"):
        open_dashboard(database, port=70000)


def test_serving_ends_with_an_interrupt(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, poll_interval: float = 0.5) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app.DashboardServer, "serve_forever", interrupted)
    urls: list[str] = []
    serve(database, port=0, listening=urls.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*/dashboard", urls[0])


def test_a_dashboard_that_can_only_read(database: Database) -> None:
    """Its page may ask for a deletion; the server refuses, and shows what there is as before."""
    record = new_study(database)
    with database.read_only() as reading, open_dashboard(reading, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = server.url.removesuffix("/dashboard")
            request = urllib.request.Request(f"{base}/api/studies/{record.optuna_study_id}", method="DELETE")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == 403
            with urllib.request.urlopen(f"{base}/api/studies/{record.optuna_study_id}") as answer:
                assert json.load(answer)["name"] == record.name
        finally:
            server.shutdown()
            thread.join()
    assert StudyStore(database).get(record.name).n_slots == 4
    assert database.optuna_storage().get_study_name_from_id(record.optuna_study_id) == record.name


def test_reading_keeps_what_the_url_says(database: Database) -> None:
    with Database(f"{database.url}&options=-csearch_path%3Dpublic", read_only=True) as reading:
        with reading.engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on"
            assert connection.exec_driver_sql("SHOW search_path").scalar() == "public"
        with pytest.raises(StorageError), reading.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE forbidden (x int)")
