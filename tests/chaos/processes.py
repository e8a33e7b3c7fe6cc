"""Processes by id: who descends from whom, freezing one, and the end of all that a run started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.chaos.counted_worker import FOLDER


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet reaped does not."""
    return _state(pid) not in ("Z", "X", "")


def _state(pid: int) -> str:
    """One letter, as in proc(5); "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process stands still inside the block, so that what is seen of it stays true until it is struck."""
    send(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 10.0
        while _state(pid) not in ("T", "") and time.monotonic() < end:  # a system call under way may still end
            time.sleep(0.01)
        yield
    finally:
        send(pid, signal.SIGCONT)


def of_run(folder: Path) -> list[int]:
    """Processes that carry the run's mark in their environment."""
    mark = f"{FOLDER}={folder}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if int(path.parent.name) != os.getpid() and mark in path.read_bytes() + b"\0":
                found.append(int(path.parent.name))
    return [pid for pid in found if alive(pid)]


def end_all(folder: Path, seconds: float = 20.0) -> list[int]:
    """Kill every process of the run; returns those that would not die."""
    end = time.monotonic() + seconds
    while (left := of_run(folder)) and time.monotonic() < end:
        for pid in left:
            send(pid, signal.SIGKILL)
        time.sleep(0.1)
    return left
