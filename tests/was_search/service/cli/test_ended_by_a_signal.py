"""Real commands that a signal ends: what they held is closed, and the embedded Postgres goes with its last user."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from was_search.process.file_lock import LockedFile
from was_search.process.signals import Terminated
from was_search.service.watching.notify import failure_words

pytestmark = [pytest.mark.postgres, pytest.mark.slow(seconds=15), pytest.mark.usefixtures("hang_ups_count")]
ROOT = Path(__file__).parents[4]
SECONDS = 120


@pytest.fixture
def home(server_home: Path, request: pytest.FixtureRequest) -> Path:
    home = server_home / f"signals-{request.node.name.replace('[', '-').rstrip(']')}"
    home.mkdir()
    return home


@pytest.fixture
def dashboard(home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts dashboards on the embedded Postgres under ``home``; each serves when this returns."""
    started: list[subprocess.Popen[str]] = []

    def start(**options: object) -> subprocess.Popen[str]:
        folders = [str(ROOT / folder) for folder in (".", "storage", "workers", "kernels")]
        process = subprocess.Popen(
            [sys.executable, "-m", "was_search", "dashboard", "--port", "0"],
            env={**os.environ, "WAS_SEARCH_HOME": str(home), "PYTHONPATH": os.pathsep.join(folders)},
            stdout=subprocess.PIPE,
            text=True,
            **{"stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
        )
        started.append(process)
        assert process.stdout is not None
        assert "optuna-dashboard on" in process.stdout.readline()
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def runs(home: Path) -> bool:
    """Whether the embedded Postgres runs: its processes hold a lock."""
    lock = LockedFile.take(home / "postgres.running")
    if lock is None:
        return True
    lock.release()
    return False


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Terminated(signal.SIGHUP), "ended by SIGHUP"),
        (SystemExit(1), "ended by a signal"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_study_says_how_its_run_ended(error: BaseException, words: str) -> None:
    """While Ray waits for workers, it raises a SystemExit of its own."""
    assert failure_words(error) == words


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_and_its_postgres(dashboard, home: Path, signum: signal.Signals, status: int) -> None:
    process = dashboard()
    assert runs(home)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=SECONDS)
    assert (process.returncode, stderr) == (status, f"ended by {signum.name}\n")
    assert not runs(home)


def test_postgres_stays_for_its_other_user(dashboard, home: Path) -> None:
    first, second = dashboard(), dashboard()
    first.terminate()
    first.communicate(timeout=SECONDS)
    assert runs(home)
    second.terminate()
    second.communicate(timeout=SECONDS)
    assert not runs(home)


def test_a_signal_to_all_that_the_terminal_holds_ends_postgres_properly(dashboard, home: Path) -> None:
    process = dashboard(start_new_session=True)
    for _ in range(2):  # the shell's and the kernel's
        os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 129
    assert not runs(home)
    assert "database system is shut down" in (home / "postgres" / "server.log").read_text().splitlines()[-1]


def test_a_terminal_that_has_gone_takes_no_output(dashboard, home: Path) -> None:
    ours, theirs = pty.openpty()
    process = dashboard(stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 129
    assert not runs(home)


def test_under_nohup_a_hang_up_is_nothing(dashboard, home: Path) -> None:
    process = dashboard(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    process.terminate()
    _, stderr = process.communicate(timeout=SECONDS)
    assert (process.returncode, stderr) == (143, "ended by SIGTERM\n")


@pytest.mark.ray
@pytest.mark.parametrize("words", ["start Ray", "calibrate on"])
def test_a_signal_to_all_of_a_run_ends_it_like_one_to_itself(home: Path, words: str) -> None:
    """As ``timeout`` sends it: Ray's own processes must not go first."""
    folders = [str(ROOT / folder) for folder in (".", "storage", "workers", "kernels")]
    process = subprocess.Popen(
        [sys.executable, "-m", "was_search", "demo", "--plan", str(home / "plan")],
        env={**os.environ, "WAS_SEARCH_HOME": str(home), "PYTHONPATH": os.pathsep.join(folders)},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = next(line for line in process.stdout if words in line)
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in each.name() for each in below), said
    os.killpg(process.pid, signal.SIGTERM)
    *_, last = process.stdout.read().splitlines()
    process.communicate(timeout=SECONDS)
    assert (process.returncode, last) == (143, "ended by SIGTERM")
    assert not psutil.wait_procs(below, timeout=20)[1]
    assert not runs(home)
