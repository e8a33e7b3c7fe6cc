"""Whether the processes of a local Ray live: without them Ray's C++ ends the process that calls it next."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_NEEDED = ("raylet", "gcs_server")
"""Processes without which nothing runs; of the others Ray itself makes do."""


def dead_process() -> str:
    """Which process of the Ray that this process has started has died, and how; "" where they live, or are not ours.

    Ray has no public name for them.
    """
    import ray._private.worker

    node = ray._private.worker._global_node
    if node is None:
        return ""
    for name in _NEEDED:
        for info in node.all_processes.get(name, ()):
            if (status := info.process.poll()) is not None:
                return f"its {name} {_how(status)}"
    return ""


def _how(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def ray_processes() -> set[int]:
    """Ids of the raylets and control stores that this process has started and not waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            number, _, rest = stat.read_text().partition(" (")
            name, _, fields = rest.rpartition(") ")
            if name in _NEEDED and int(fields.split()[1]) == os.getpid():
                found.add(int(number))
    return found


def end_processes(numbers: Iterable[int]) -> None:
    """Kill what a start of Ray that failed has left behind; what belongs to it ends with it."""
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
