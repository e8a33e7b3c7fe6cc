"""Passwords on a real server: in no message, traceback, log, pickle, process list, file or row."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import make_url
from typer.testing import CliRunner

from scripts.make_random_model import make_random_model
from tests.doubles.small_run import environment
from tests.security.conftest import Logins
from tests.security.tcp_server import password_of
from tests.security.test_dashboard_user import contents
from was_search.errors import StorageError, TransientError
from was_search.service.cli.main import app
from was_search.service.settings import Settings
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_storage.server.database import Database

pytestmark = pytest.mark.postgres


def spellings(url: str) -> set[str]:
    """The password of ``url`` as it may appear; the part without odd characters is enough."""
    password = password_of(url)
    core = re.findall(r"[0-9a-f]{16}", password)[0]
    return {password, quote(password, safe=""), core}


def assert_silent(words: str, url: str) -> None:
    for spelling in spellings(url):
        assert spelling not in words, words[max(0, words.find(spelling) - 300) : words.find(spelling) + 100]


def changed(url: str, **values: object) -> str:
    return make_url(url).set(**values).render_as_string(hide_password=False)  # type: ignore[arg-type]


def core_of(url: str) -> str:
    """The password's part without odd characters."""
    return min(spellings(url))


def broken(url: str) -> list[str]:
    """URLs that fail, each in its own way."""
    plain = url.replace("postgresql+psycopg2", "postgresql")
    core = spellings(url)
    return [
        changed(url, password="x" + password_of(url)),
        changed(url, username="nobody"),
        changed(url, database="nowhere"),
        changed(url, port=1),
        changed(url, host="no-such-host.invalid"),
        url + "?sslmode=verify-full",
        url + "?sslmode=wrong",
        url + "?sslmode=require",
        url + f"?nonsense={min(core)}",
        url + f"?sslpassword={min(core)}&sslmode=require",
        url + "?options=-cnonsense%3D1",
        plain.replace("postgresql://", "mysql://"),
        plain.replace("postgresql://", "postgresql:/"),
        plain.replace("127.0.0.1:", "127.0.0.1:x"),
        plain.replace("postgresql://", "postgresql://more@"),
        plain.replace("127.0.0.1:", "127.0.0.1:1,127.0.0.1:2,x127.0.0.1:"),
        plain.replace("/searches", "/searches?service=nowhere"),
        plain.replace("%40", "/"),
        f"host=127.0.0.1 port=1 user=owner password='{password_of(url)}'",
        f"host=127.0.0.1 port=x user=owner password={core_of(url)}",
        " " + plain.replace("@127", "@@127"),
    ]


def test_no_failing_connection_tells_the_password(
    logins: Logins, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the message nor the traceback with its causes, nor what any library logs at its most talkative."""
    caplog.set_level(logging.DEBUG)
    for url in broken(logins.owner):
        with pytest.raises((StorageError, TransientError)) as caught:
            Database.open(url)
        trace = "".join(traceback.format_exception(caught.value))
        assert_silent(trace.split("\n    Database.open", 1)[0] + str(caught.value) + repr(caught.value), logins.owner)
        assert_silent(trace, logins.owner)
    assert_silent(caplog.text, logins.owner)
    captured = capfd.readouterr()
    assert_silent(captured.out + captured.err, logins.owner)


def test_no_log_of_any_library_tells_it(logins: Logins, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy", "optuna", "alembic", "was_storage"):
        caplog.set_level(logging.DEBUG, logger=name)
    with Database.open(logins.owner) as database:
        database.optuna_storage().get_all_studies()
        assert "***" in database.display_url
        assert_silent(repr(database) + str(vars(database).get("engine")), logins.owner)
    assert caplog.records
    assert_silent(caplog.text, logins.owner)


def test_passwords_in_files_open_and_are_told_by_nothing(
    logins: Logins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """libpq's password and service files, as arguments and as variables."""
    caplog.set_level(logging.DEBUG)
    url = make_url(logins.owner)
    password = password_of(logins.owner)
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    passwords, services = tmp_path / "pass", tmp_path / "services"
    passwords.write_text(f"*:{url.port}:*:{url.username}:{escaped}\n", encoding="utf-8")
    passwords.chmod(0o600)
    services.write_text(
        f"[searches]\nhost={url.host}\nport={url.port}\ndbname={url.database}\nuser={url.username}\npassword={password}\n",
        encoding="utf-8",
    )
    bare = f"postgresql://{url.username}@{url.host}:{url.port}/{url.database}"
    twice = bare.replace(f"{url.host}:{url.port}", f"{url.host}:1,{url.host}:{url.port}")
    for given, variables in (
        (bare + f"?passfile={passwords}", {}),
        (bare, {"PGPASSFILE": str(passwords)}),
        (twice, {"PGPASSFILE": str(passwords)}),
        ("service=searches", {"PGSERVICEFILE": str(services)}),
        ("postgresql:///?service=searches", {"PGSERVICEFILE": str(services)}),
        (bare, {"PGPASSWORD": password}),
    ):
        with monkeypatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)
            with Database.open(given) as database:
                database.optuna_storage()
                assert_silent(repr(vars(database)) + database.display_url + database.url, logins.owner)
            result = CliRunner().invoke(app, ["studies", "--storage", given])
            assert result.exit_code == 0, result.output
            assert_silent(result.output, logins.owner)
    assert_silent(caplog.text, logins.owner)


def test_no_pickle_or_representation_holds_it(logins: Logins) -> None:
    settings = Settings(storage=logins.owner, notify="https://hooks.example/s3cret")
    assert_silent(repr(settings) + str(settings.to_json()), logins.owner)
    assert "s3cret" not in repr(settings) + str(settings.to_json())
    with Database.open(logins.owner) as database:
        for held in (settings, database):
            with pytest.raises(TypeError, match="not pickled"):
                pickle.dumps(held)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["studies"],
        ["status", "no such study"],
        ["db", "init"],
        ["pause", "no such study"],
        ["studies", "--json"],
        ["dashboard", "--study", "no such study"],
    ],
)
def test_no_command_tells_it(logins: Logins, arguments: list[str]) -> None:
    for url in (logins.owner, changed(logins.owner, password="x" + password_of(logins.owner))):
        for how in ("environment", "flag"):
            given = [*arguments, "--storage", url] if how == "flag" else arguments
            result = CliRunner().invoke(app, given, env={"WAS_SEARCH_STORAGE": url})
            assert_silent(result.output + str(result.exception), url)


def ours(environment_mark: str) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, command line and environment of every process that carries the mark."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            surroundings = (folder / "environ").read_bytes()
            if environment_mark.encode() in surroundings and int(folder.name) != os.getpid():
                yield (folder / "comm").read_text().strip(), (folder / "cmdline").read_bytes(), surroundings
        except OSError:
            continue


def process_list() -> str:
    return subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_password_that_is_typed_leaves_the_process_list(logins: Logins, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "was_search", "dashboard", "--port", "0", "--storage", logins.reader]
    env = {name: value for name, value in environment().items() if name != "WAS_SEARCH_STORAGE"}
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command, env={**env, "PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log, cwd=tmp_path)
        try:
            end = time.monotonic() + 300
            while "optuna-dashboard on" not in (words := (tmp_path / "log").read_text()):
                assert process.poll() is None and time.monotonic() < end, words
                time.sleep(0.2)
            assert str(process.pid) in subprocess.run(["ps", "-e"], capture_output=True, text=True).stdout
            assert "was_search dashboard --port 0" in process_list()
            assert_silent(process_list(), logins.reader)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)
    words = (tmp_path / "log").read_text()
    assert "put the URL into WAS_SEARCH_STORAGE instead" in words
    assert_silent(words, logins.reader)


@pytest.mark.slow
def test_the_dashboards_pages_do_not_hold_it(logins: Logins, coordinator: Database) -> None:
    from tests.security.test_dashboard_user import served

    with Database.open(logins.reader) as mine, mine.read_only() as reading, served(reading) as address:
        for path in ("/dashboard", "/api/meta", "/api/studies", "/api/studies/0", "/api/nothing", "/artifacts/0/0"):
            try:
                with urllib.request.urlopen(address + path, timeout=60) as answer:
                    words = answer.read().decode(errors="replace")
            except urllib.error.HTTPError as error:
                words = error.read().decode(errors="replace")
            assert_silent(words, logins.reader)


def events(words: str) -> dict[str, list[dict[str, Any]]]:
    """Lines of a log by their event."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in words.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            found.setdefault(entry["event"], []).append(entry)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_whole_run_leaves_it_nowhere(logins: Logins, coordinator: Database, tmp_path: Path) -> None:
    """The main job with real workers; what it starts, writes, prints and stores is looked through."""
    import shutil
    import tempfile

    model = make_random_model(tmp_path / "model", "tiny")
    sessions = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Unix sockets: a short path
    mark = f"WAS_SECURITY_MARK={tmp_path}"
    command = [
        sys.executable, "-m", "was_search", "run", "--model", str(model), "--data", str(DEMO_FOLDER / "text"),
        "--device", "cpu", "--ray", "local", "--workers", "1", "--study", "silent", "--trials", "5",
        "--sequence-length", "48", "--calibration-sequences", "4", "--pricing-sequences", "4", "--seed-rounds", "0",
        "--slope-sequences", "4", "--search-sequences", "4", "--test-sequences", "4", "--descent-epochs", "0",
        "--compensation-steps", "2", "--log-format", "json",
    ]  # fmt: skip
    env = {
        **environment(),
        "WAS_SEARCH_STORAGE": logins.coordinator,
        "RAY_TMPDIR": str(sessions),
        "WAS_SECURITY_MARK": str(tmp_path),
        "RAY_LOG_TO_DRIVER": "1",
    }
    seen: set[str] = set()
    holding: set[str] = set()
    try:
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)
            while process.poll() is None:
                for name, line, surroundings in ours(mark):
                    seen.add(name)
                    assert_silent(line.decode(errors="replace"), logins.coordinator)
                    if any(s.encode() in surroundings for s in spellings(logins.coordinator)):
                        holding.add(line.replace(b"\0", b" ").decode(errors="replace")[:60])
                time.sleep(0.1)
        words = (tmp_path / "log").read_text()
        assert process.returncode == 0, words[-3000:]
        assert any("raylet" in name for name in seen), seen
        assert any(name.startswith("ray::") for name in seen), seen
        # Only the command itself knows it.
        assert {name for name in holding if "was_search run" not in name} == set()
        assert_silent(words, logins.coordinator)
        told = events(words)
        assert {"study taken over", "search begun", "slot handed out", "slot finished", "search ended"} <= set(told)
        done = told["slot finished"][0]
        kept = "".join(path.read_text(errors="replace") for path in sessions.rglob("worker-*.err"))
        ended = next(line for line in events(kept)["evaluation ended"] if line["slot"] == done["slot"])
        ids = ("study", "slot", "attempt", "trial", "worker")
        assert [ended[name] for name in ids] == [done[name] for name in ids]
        assert all(value not in (None, "") for value in [done[name] for name in ids])
        assert "model loaded" in events(kept)
        phases = {
            **{"calibration pass": "calibrate", "pricing": "price", "plan evaluation": "evaluate"},
            **{"dense top": "dense top", "compensation": "compensation"},
        }
        for what, phase in phases.items():
            ends = [line for line in events(kept)[f"{what} ended"] if line["phase"] == phase]
            assert ends and all(line["study"] == "silent" and line["attempt"] == 1 for line in ends)
            assert all({"part", "worker", "seconds"} <= set(line) for line in ends)
        assert {line["phase"] for line in told["phase ended"]} == set(phases.values())
        looked_at = 0
        for folder in (tmp_path, sessions, Path(tempfile.gettempdir()) / "ray"):
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink() and path.stat().st_mtime > time.time() - 1000:
                    looked_at += 1
                    assert_silent(path.read_bytes().decode(errors="replace"), logins.coordinator)
        assert looked_at > 20
        assert (tmp_path / "was-runs" / "silent" / "plan" / "plan.json").is_file()
    finally:
        shutil.rmtree(sessions, ignore_errors=True)
    for name, rows in contents(coordinator).items():
        for row in rows:
            assert_silent(f"{name}: {row}", logins.coordinator)
