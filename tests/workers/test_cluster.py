"""Connecting to Ray: signals that meet it, failures to start or to connect, and where a local one lies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

import was_workers.cluster as cluster_module
from was_search.errors import ResourceError
from was_search.process.signals import Terminated, terminable
from was_workers import local_ray, session_folder
from was_workers.cluster import connect


def test_a_signal_while_ray_starts_is_no_status_of_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own handler, which is in place meanwhile, exits with 15."""

    def start(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(Terminated) as end, terminable(), connect("local", workers=1):
        pytest.fail("it was not ended")
    assert end.value.code == 143


@pytest.mark.ray
@pytest.mark.own_ray
@pytest.mark.slow
def test_a_signal_ends_a_wait_for_workers() -> None:
    """In the middle of Ray's C code, long before what it waits for."""

    def wait() -> None:
        never = ray.remote(lambda: time.sleep(3600)).remote()
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        ray.wait([never], timeout=600)

    with pytest.raises(Terminated) as end, terminable(), connect("local", workers=1):
        wait()
    assert end.value.code == 143


def test_a_signal_after_that_is_ours_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with pytest.raises(Terminated) as end, terminable(), connect("local", workers=1):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ValueError("Attempting to cap object store memory usage at 5 bytes, but the minimum allowed is 78643200"),
            r"none could be started on this machine \(Attempting to cap .*its logs are in .*/session_latest/logs; RAY",
        ),
        (PermissionError(13, "Permission denied", "/x/ray"), r"none could be started .*Permission denied: '/x/ray'"),
        (Exception("The current node timed out during startup. This"), "none could be started .*timed out during"),
        (RuntimeError(), r"none could be started on this machine \(RuntimeError\(\)\)"),
    ],
)
def test_what_keeps_a_local_ray_from_starting_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    monkeypatch.setattr(ray, "init", raising(error))
    with pytest.raises(ResourceError, match=words) as refused, connect("local", workers=1):
        pytest.fail("it was started")
    assert "--ray local" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ConnectionError("no answer\nmore"),
            r"no cluster could be reached at '10.0.0.1:6379' \(no answer\); start one",
        ),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.12.1\n"),
            r"runs other versions \(.* Ray: 2.50.0 Python: 3.12.1\); install the cluster's Ray and Python here",
        ),
    ],
)
def test_what_a_cluster_says_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    monkeypatch.setattr(cluster_module, "require_ray", lambda address: None)
    monkeypatch.setattr(ray, "init", raising(error))
    with pytest.raises(ResourceError, match=words), connect("10.0.0.1:6379", workers=1):
        pytest.fail("it was reached")


def test_a_busy_machine_is_given_time(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Ray's own 30 seconds cannot be set."""
    too_slow = Exception("The current node timed out during startup. This could happen because")
    left = [2]
    starts: list[subprocess.Popen[bytes]] = []

    def init(**options: Any) -> None:
        starts.append(subprocess.Popen(["sleep", "600"]))
        if left[0]:
            left[0] -= 1
            raise too_slow

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(local_ray, "_NEEDED", ("sleep",))
    with connect("local", workers=1):
        pass
    assert [process.wait(60) for process in starts] == 3 * [-signal.SIGKILL], "nothing stays behind"
    assert caplog.text.count("the local Ray did not start within 30 s; it is tried again") == 2
    left[0] = 9
    with pytest.raises(ResourceError, match=r"none could be started .*timed out during"), connect("local", workers=1):
        pytest.fail("it was started")
    assert left[0] == 6
    assert [process.wait(60) for process in starts[3:]] == 3 * [-signal.SIGKILL]


def raising(error: Exception) -> Any:
    def init(**options: Any) -> None:
        raise error

    return init


@pytest.fixture
def long_tmpdir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return folder


def test_a_long_tmpdir_gets_a_short_session(monkeypatch: pytest.MonkeyPatch, long_tmpdir: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with connect("local", workers=1):
        pass
    folder = Path(asked[0]["_temp_dir"])
    assert len(str(folder)) < 40 and folder.parent.stat().st_mode & 0o777 == 0o700
    assert asked[0]["object_spilling_directory"] == str(long_tmpdir), "what is large stays where it was wanted"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with connect("local", workers=1):
        pass
    assert "_temp_dir" not in asked[1], "Ray's own choice is kept where it has room"


def test_a_session_folder_of_someone_else_is_refused(monkeypatch: pytest.MonkeyPatch, long_tmpdir: Path) -> None:
    monkeypatch.setattr(session_folder, "is_private", lambda folder, owners: False)
    with pytest.raises(ResourceError, match="belongs to someone else; remove it, or set RAY_TMPDIR to a short folder"):
        session_folder.session_folder()


@pytest.mark.ray
@pytest.mark.own_ray
@pytest.mark.slow
def test_a_local_ray_runs_under_a_long_tmpdir(long_tmpdir: Path) -> None:
    for _ in range(2):  # Ray opens its folder to everybody, ours stays private
        with connect("local", workers=1):
            assert ray.get(ray.remote(lambda: 7).remote()) == 7
