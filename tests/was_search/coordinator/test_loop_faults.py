"""Forty trials asked are forty slots, each finished once: through a killed worker, an interrupt, a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.doubles.small_run import assert_each_finished_once, environment, small_flags, small_settings
from tests.doubles.workers_here import workers_here
from was_search.service.cli.main import app
from was_search.service.context import Context
from was_search.service.steps.study import search
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.slow(seconds=40)]


def finished(database: Database, study: str) -> int:
    return sum(n for state, n in StudyStore(database).get(study).counts.items() if state.finished)


def wait_until(condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_a_killed_worker_loses_and_doubles_nothing(postgres_url: str) -> None:
    killed: list[int] = []
    with Context(small_settings(storage=postgres_url, study="killed-worker", early_stopping=False)) as context:

        def kill_one_in_flight() -> None:
            with Database.open(postgres_url) as own:
                wait_until(lambda: "killed-worker" in {r.name for r in StudyStore(own).list()})
                wait_until(lambda: finished(own, "killed-worker") >= 8)

                def running() -> list[str]:
                    slots = StudyStore(own).slots("killed-worker")
                    return [slot.worker for slot in slots if slot.state is SlotState.RUNNING]

                wait_until(lambda: bool(running()))
                pid = int(running()[0].rsplit(":", 1)[1])
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

        killer = threading.Thread(target=kill_one_in_flight, daemon=True)
        killer.start()
        result = search(context)
        killer.join()
        assert killed
        slots = assert_each_finished_once(context.database, "killed-worker", 40)
    assert not result.drained
    assert any(slot.attempt > 1 for slot in slots), "the kill hit nothing in flight"
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert killed[0] not in {int(slot.worker.rsplit(":", 1)[1]) for slot in slots[-4:]}


def start_search(storage: str, study: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "was_search", "search", *small_flags(storage=storage, study=study, workers=1)]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def search_here(storage: str, study: str) -> Result:
    """The same command in this process, workers and all: what it finds stored does not know who stored it."""
    with workers_here():
        return CliRunner().invoke(app, ["search", *small_flags(storage=storage, study=study, workers=1)])


def test_an_interrupted_search_drains_and_the_same_command_resumes(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_search(postgres_url, "interrupted", tmp_path)
    with Database.open(postgres_url) as database:
        wait_until(lambda: "interrupted" in {r.name for r in StudyStore(database).list()})
        wait_until(lambda: finished(database, "interrupted") >= 6)
        first.send_signal(signal.SIGINT)
        _, stderr = first.communicate(timeout=600)
        assert first.returncode == 3
        assert "resume with" in stderr
        assert "Traceback" not in stderr
        before = {slot.number: slot for slot in StudyStore(database).slots("interrupted")}
        assert not any(slot.state is SlotState.RUNNING for slot in before.values())
        done = {number for number, slot in before.items() if slot.state.finished}
        assert 6 <= len(done) < 40

        # The second run is killed outright, with work in flight; the third one finishes.
        second = start_search(postgres_url, "interrupted", tmp_path)
        wait_until(lambda: finished(database, "interrupted") >= len(done) + 4)
        second.kill()
        second.communicate(timeout=600)
        monkeypatch.chdir(tmp_path)
        third = search_here(postgres_url, "interrupted")
        assert third.exit_code == 0, third.output
        after = assert_each_finished_once(database, "interrupted", 40)
        assert {n: after[n].loss_nats for n in done} == {n: before[n].loss_nats for n in done}

        # Once more: nothing is left to do, and nothing is done.
        fourth = search_here(postgres_url, "interrupted")
        assert fourth.exit_code == 0
        assert "search: cached" in fourth.stdout
        assert [s.finished_at for s in StudyStore(database).slots("interrupted")] == [s.finished_at for s in after]
