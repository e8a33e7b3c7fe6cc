"""Nothing that a run starts outlives it, whoever its parent is by then."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos import processes
from tests.chaos.cluster import Cluster, Plan, RayNode, StuckError
from tests.chaos.counted_worker import FOLDER


def orphan(folder: Path) -> int:
    """A marked process whose parent has gone, once it shows its mark: while it starts, it has no environment."""
    command = ["sh", "-c", "sleep 300 > /dev/null 2>&1 & echo $!"]
    started = subprocess.run(command, env={**os.environ, FOLDER: str(folder)}, capture_output=True, text=True)
    pid = int(started.stdout)
    end = time.monotonic() + 60
    while pid not in processes.of_run(folder):
        assert time.monotonic() < end
        time.sleep(0.01)
    return pid


def test_orphans_are_found_by_their_mark_and_ended(tmp_path: Path) -> None:
    ours, others = orphan(tmp_path), orphan(tmp_path / "other")
    try:
        assert processes.of_run(tmp_path) == [ours]
        assert processes.end_all(tmp_path) == []
        assert not processes.alive(ours)
        assert processes.alive(others)
    finally:
        processes.end_all(tmp_path / "other")


def test_a_frozen_process_stands_still_until_the_block_ends(tmp_path: Path) -> None:
    pid = orphan(tmp_path)

    def state() -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    try:
        with processes.frozen(pid):
            assert state() == "T"
            assert processes.alive(pid)
        assert state() != "T"
        processes.send(pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while processes.alive(pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not processes.alive(pid)
        processes.send(pid, signal.SIGKILL)  # one that has gone is no error
    finally:
        processes.end_all(tmp_path)


def test_a_node_that_ray_gave_up_while_it_started_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def node(name: str, words: str, code: int | None) -> Any:
        made = RayNode.__new__(RayNode)
        made.name, made.log = name, tmp_path / f"{name}.log"
        made.log.write_text(words)
        made.process = SimpleNamespace(poll=lambda: code, returncode=code)  # type: ignore[assignment]
        return made

    cluster = Cluster(Plan(trials=1), folder=tmp_path)
    cluster.head, cluster._nodes_made = node("head", "Ray runtime started", None), 2
    cluster.nodes = [node("slow", "Exception: The current node timed out during startup.", 1)]
    monkeypatch.setattr(Cluster, "_new_node", lambda self: node("next", "", None))
    cluster.supervise()
    assert [each.name for each in cluster.nodes] == ["next"]
    cluster.nodes = [node("dead", "Ray runtime started\nException: a raylet died", 1)]
    with pytest.raises(StuckError, match="dead ended by itself with code 1"):
        cluster.supervise()


def test_what_is_stuck_says_what_it_waited_for_and_shows_the_logs(tmp_path: Path) -> None:
    cluster = Cluster(Plan(trials=1), folder=tmp_path)
    (tmp_path / "coordinator-3.log").write_text("".join(f"line {i}\n" for i in range(99)))
    with pytest.raises(StuckError, match="in vain until the moon is full") as error:
        cluster.wait_until("the moon is full", lambda: False, 0.1)
    assert "coordinator-3.log" in str(error.value)
    assert "line 98" in str(error.value)
    assert "line 50" not in str(error.value)
