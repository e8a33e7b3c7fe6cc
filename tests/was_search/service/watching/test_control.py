"""A real study on local Ray that is paused, resumed, resized, drained and cancelled while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.doubles.small_run import assert_each_finished_once, environment, small_flags
from tests.doubles.workers_here import workers_here
from was_search.errors import StudyError
from was_search.service.cli.main import app
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.watching.control import ask, change
from was_search.studies.control import Overrides, Wish
from was_search.studies.overview import overview, to_json
from was_search.studies.slots import SlotState
from was_storage.studies.overview import read_snapshot
from was_storage.studies.store import StudyStore

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.slow(seconds=90)]

STUDY = "controlled"


@pytest.fixture
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """URL of a webhook, and what it got."""
    messages: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", messages
    server.shutdown()
    server.server_close()


@pytest.fixture
def was_search(postgres_url: str, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``was-search ...`` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "was_search", *words]
        environ = {**environment(), "WAS_SEARCH_STORAGE": postgres_url}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def search_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``was-search search ...`` in this process, workers and all: for what nobody changes while it runs."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Result:
        with workers_here():
            return CliRunner().invoke(app, ["search", *words])

    return run


def test_a_running_study_obeys(postgres_url: str, was_search, search_here, received) -> None:
    url, messages = received
    flags = small_flags(storage=postgres_url, study=STUDY, workers=1, trials=500)
    flags += ["--no-early-stopping", "--notify", url]
    search = was_search("search", *flags)
    with Context(Settings(storage=postgres_url)) as here:
        database = here.database

        def look():
            snapshot = read_snapshot(database, STUDY)
            return snapshot, overview(snapshot)

        def until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
            end = time.monotonic() + seconds
            while not condition():
                assert search.poll() is None, search.communicate()
                assert time.monotonic() < end, StudyStore(database).list()
                time.sleep(0.1)

        def counts() -> dict[SlotState, int]:
            return StudyStore(database).get(STUDY).counts

        def finished() -> int:
            return sum(n for state, n in counts().items() if state.finished)

        until(lambda: STUDY in {record.name for record in StudyStore(database).list()})
        until(lambda: finished() >= 4)

        ask(here, STUDY, Wish.PAUSE)
        until(lambda: look()[1].play == "paused" and counts()[SlotState.RUNNING] == 0)
        at_pause = finished()
        time.sleep(3.0)
        assert finished() == at_pause
        snapshot, found = look()
        shown = to_json(snapshot, found, gpu_price=2.0)
        assert shown["state"] == "paused"
        assert shown["coordinator"].endswith(f":{search.pid}")
        assert (shown["finished"], shown["n_slots"], shown["cost"]) == (at_pause, 500, 0.0)
        assert 0.0 < shown["busy_share"] <= 1.0

        change(here, STUDY, Overrides(workers=2, trials=400))
        until(lambda: look()[1].pool.ready == 2 and look()[1].n_slots == 400)
        ask(here, STUDY, Wish.RUN)
        until(lambda: len({s.worker for s in StudyStore(database).slots(STUDY) if s.finished_at}) == 2)
        assert finished() > at_pause

        change(here, STUDY, Overrides(workers=1))
        until(lambda: look()[1].workers == 1)
        before = finished()
        until(lambda: finished() >= before + 2)

        ask(here, STUDY, Wish.DRAIN)
        _, stderr = search.communicate(timeout=600)
        assert search.returncode == 3, stderr
        assert "resume with" in stderr
        assert "Traceback" not in stderr
        assert look()[1].play == "drained"
        slots = StudyStore(database).slots(STUDY)
        assert not any(slot.state is SlotState.RUNNING for slot in slots)
        assert all(slot.attempt == 1 for slot in slots if slot.state.finished), "resizing lost a call"
        done = {slot.number: slot.loss_nats for slot in slots if slot.state.finished}
        assert len(done) < 400
        assert messages[-1]["event"] == "drained"

        # The same command goes on, and does not take back what was set: 400 trials, though it says 500.
        change(here, STUDY, Overrides(workers=2))
        search = was_search("search", *flags)
        until(lambda: finished() >= len(done) + 1 and counts()[SlotState.RUNNING] == 2)
        ask(here, STUDY, Wish.CANCEL)
        stdout, stderr = search.communicate(timeout=600)
        assert search.returncode == 3, stderr
        assert f"study {STUDY} was drained; it goes on" in stdout
        assert look()[1].play == "cancelled"
        slots = StudyStore(database).slots(STUDY)
        assert not any(slot.state is SlotState.RUNNING for slot in slots)
        assert {slot.error for slot in slots if slot.state is SlotState.WAITING and slot.attempt} == {"cancelled"}
        assert messages[-1]["event"] == "cancelled"

        # A rule ends it in the ordinary way, with trials left.
        so_far = finished()
        change(here, STUDY, Overrides(max_seconds=1))
        ended = search_here(*flags)
        assert ended.exit_code == 0, ended.output
        assert "max_seconds" in ended.stdout
        assert finished() == so_far  # earlier runs count
        assert messages[-1]["event"] == "finished"
        assert messages[-1]["detail"].startswith("max_seconds")

        # Fewer trials while nothing runs: all that have a vector, and two more.
        n = 3 + max(slot.number for slot in slots if slot.levels is not None)
        with pytest.raises(StudyError, match=f"trials: must be at least {n - 2}, got {n - 3}"):
            change(here, STUDY, Overrides(trials=n - 3))
        change(here, STUDY, Overrides(max_seconds=0, trials=n))
        ended = search_here(*flags)
        assert ended.exit_code == 0, ended.output
        after = assert_each_finished_once(database, STUDY, n)
        assert {number: after[number].loss_nats for number in done} == done
        assert look()[1].play == "finished"
    last = messages[-1]
    assert (last["event"], last["study"], last["slots"]["total"]) == ("finished", STUDY, n)
    assert last["best_loss_nats"] == min(slot.loss_nats for slot in after)
    assert "postgres" not in json.dumps(messages)
