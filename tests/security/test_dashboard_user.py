"""Whoever reaches the dashboard tries to change what is there, by every way that its HTTP interface has."""

from __future__ import annotations

import base64
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getsource
from pathlib import Path
from typing import Any

import numpy as np
import optuna_dashboard._app
import optuna_dashboard._rdb_migration
import optuna_dashboard.artifact._backend
import pytest
from sqlalchemy import text

from tests.doubles.small_study import finish, hand_out, new_study, propose
from tests.security.conftest import Logins
from tests.security.tcp_server import password_of
from tests.storage.dashboard.test_plan_files import plan_in
from was_search.studies.slots import SlotState
from was_storage.dashboard.app import open_dashboard
from was_storage.dashboard.plan_files import archive, attach_plan
from was_storage.dashboard.study_page import annotate
from was_storage.server.database import Database
from was_storage.studies.store import StudyRecord, StudyStore

pytestmark = pytest.mark.postgres

HTML = base64.b64encode(b"<script>alert(1)</script>").decode()


@pytest.fixture(scope="module")
def record(coordinator: Database, tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """A study with a finished, a running and a waiting trial, a note and a plan."""
    record = new_study(coordinator, 4, "attacked")
    with StudyStore(coordinator).coordinate(record.name) as session:
        for number in range(3):
            propose(session, number)
        attempt = hand_out(session, 0, "worker")
        finish(session, 0, attempt, SlotState.COMPLETE, losses=np.array([2.0]), worker="worker")
        hand_out(session, 1, "worker")
    annotate(coordinator, record.name, note="the note", figures={})
    attach_plan(coordinator, record.name, plan_in(tmp_path_factory.mktemp("plans") / "plan"))
    return StudyStore(coordinator).get(record.name)


def contents(database: Database) -> dict[str, list[str]]:
    """Every row of every table."""
    with database.begin() as connection:
        names = connection.execute(
            text("SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname IN ('was', 'public')")
        ).scalars()
        return {
            name: sorted(connection.execute(text(f"SELECT CAST(t AS text) FROM {name} t")).scalars()) for name in names
        }


@contextmanager
def served(database: Database) -> Iterator[str]:
    with open_dashboard(database, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.url.removesuffix("/dashboard")
        finally:
            server.shutdown()
            thread.join()


def ask(address: str, method: str, path: str, body: Any = None) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(
        address + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace"), dict(error.headers)


def attacks(database: Database, record: StudyRecord) -> list[tuple[str, str, Any]]:
    """One request a route that changes something, on things that are there."""
    study = record.optuna_study_id
    trials = {s.number: s.trial_id for s in StudyStore(database).slots(record.name)}
    finished, running = trials[0], trials[1]
    with database.begin() as connection:
        plan = connection.execute(text("SELECT key FROM was.artifact WHERE kind = 'plan'")).scalar()
    file = {"file": f"data:text/html;base64,{HTML}", "filename": "x.html"}
    return [
        ("POST", "/api/studies", {"study_name": "new", "directions": ["minimize"]}),
        ("POST", f"/api/studies/{study}/rename", {"study_name": "renamed"}),
        ("DELETE", f"/api/studies/{study}", None),
        ("DELETE", f"/api/studies/{study}", {"remove_associated_artifacts": True}),
        ("PUT", f"/api/studies/{study}/note", {"body": "defaced", "version": 1}),
        ("PUT", f"/api/studies/{study}/{finished}/note", {"body": "defaced", "version": 1}),
        ("POST", f"/api/studies/{study}/preference", {"candidates": [0, 1], "clicked": 1, "mode": "ChooseWorst"}),
        ("PUT", f"/api/studies/{study}/preference_feedback_component", {"output_type": "note"}),
        ("DELETE", f"/api/studies/{study}/preference/x", None),
        ("POST", f"/api/studies/{study}/preference/x", None),
        ("POST", f"/api/trials/{running}/tell", {"state": "Complete", "values": [0.0]}),
        ("POST", f"/api/trials/{running}/tell", {"state": "Fail"}),
        ("POST", f"/api/trials/{running}/user-attrs", {"user_attrs": {"slot": 7}}),
        ("POST", f"/api/studies/{study}/{running}/skip", None),
        ("POST", f"/api/artifacts/{study}/{running}", file),
        ("POST", f"/api/artifacts/{study}", file),
        ("DELETE", f"/api/artifacts/{study}/{running}/{plan}", None),
        ("DELETE", f"/api/artifacts/{study}/{plan}", None),
        ("POST", "/incompatible-rdb-schema", None),
    ]


def shape_of(path: str) -> str:
    return re.sub(r"<[^>]*>|/(?:[0-9]+|x|[0-9a-f-]{36})(?=/|$)", lambda m: "/*" if m[0][0] == "/" else "*", path)


def test_no_route_that_changes_something_is_forgotten(coordinator: Database, record: StudyRecord) -> None:
    """A later optuna-dashboard may have more of them."""
    sources = (optuna_dashboard._app, optuna_dashboard._rdb_migration, optuna_dashboard.artifact._backend)
    routes = {
        (method.upper(), shape_of(path))
        for module in sources
        for method, path in re.findall(r"@app\.(post|put|delete|patch)\(\"([^\"]+)\"", getsource(module))
    }
    assert len(routes) > 12
    assert routes == {(method, shape_of(path)) for method, path, _ in attacks(coordinator, record)}


@pytest.mark.parametrize("edits", [False, True], ids=["read-only", "allow-edits"])
def test_a_readers_login_changes_nothing(
    coordinator: Database, record: StudyRecord, logins: Logins, edits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The role holds even where the server was told to allow edits."""
    before = contents(coordinator)
    with Database.open(logins.reader) as mine, opened(mine, edits) as database, served(database) as address:
        for method, path, body in attacks(coordinator, record):
            status, words, _ = ask(address, method, path, body)
            # The migration page leads back to the dashboard where there is nothing to migrate.
            nothing_to_do = edits and path == "/incompatible-rdb-schema"
            assert (status == 403) if not edits else status >= 400 or nothing_to_do, f"{method} {path}: {words[:200]}"
            assert contents(coordinator) == before, f"{method} {path}"
            assert password_of(logins.reader) not in words
        # It still shows.
        for path in ("/api/studies", f"/api/studies/{record.optuna_study_id}", "/dashboard"):
            status, words, headers = ask(address, "GET", path)
            assert status == 200, words
            assert headers["X-Content-Type-Options"] == "nosniff"
    assert password_of(logins.reader) not in caplog.text


@contextmanager
def opened(database: Database, edits: bool) -> Iterator[Database]:
    if edits:
        yield database
        return
    with database.read_only() as reading:
        yield reading


def test_a_coordinators_login_shows_only_unless_edits_are_allowed(coordinator: Database, record: StudyRecord) -> None:
    """The attacks are real: with edits allowed and a login that may write, they succeed."""
    victim = new_study(coordinator, 1, "victim")
    before = contents(coordinator)
    path = f"/api/studies/{victim.optuna_study_id}"
    with coordinator.read_only() as reading, served(reading) as address:
        assert ask(address, "DELETE", path)[0] == 403
        for method in ("PATCH", "OPTIONS", "TRACE", "BREW"):
            assert ask(address, method, path)[0] == 403
    assert contents(coordinator) == before
    with served(coordinator) as address:
        assert ask(address, "DELETE", path)[0] == 204
    assert contents(coordinator) != before
    StudyStore(coordinator).delete("victim")


def test_a_plan_is_downloaded_and_never_shown_as_a_page(
    coordinator: Database, record: StudyRecord, logins: Logins, tmp_path: Path
) -> None:
    with Database.open(logins.reader) as mine, mine.read_only() as reading, served(reading) as address:
        detail = json.loads(ask(address, "GET", f"/api/studies/{record.optuna_study_id}")[1])
        (found,) = detail["artifacts"]
        assert found["filename"] == "attacked-plan.zip"
        path = f"/artifacts/{record.optuna_study_id}/{found['artifact_id']}"
        with urllib.request.urlopen(address + path, timeout=60) as answer:
            assert answer.read() == archive(plan_in(tmp_path / "plan"))
            assert answer.headers["Content-Disposition"] == "attachment"
            assert answer.headers["Content-Security-Policy"].startswith("sandbox")
        for path in ("/artifacts/1/../../etc/passwd", "/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/x"):
            status, words, _ = ask(address, "GET", path)
            assert status >= 400
            assert "root:" not in words


def test_a_page_of_another_site_cannot_use_the_visitors_browser(coordinator: Database, record: StudyRecord) -> None:
    """A form or a simple request of another page sends no JSON; what does asks first, and is told no."""
    before = contents(coordinator)
    with served(coordinator) as address:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            request = urllib.request.Request(
                f"{address}/api/studies/{record.optuna_study_id}/rename",
                method="POST",
                data=b'{"study_name": "renamed"}',
                headers={"Content-Type": kind, "Origin": "http://evil.example"},
            )
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(request, timeout=60)
        status, _, headers = ask(address, "OPTIONS", f"/api/studies/{record.optuna_study_id}")
        assert status == 405
        assert "Access-Control-Allow-Origin" not in headers
    assert contents(coordinator) == before
