"""The processes of a local Ray: whether they live, since Ray's C++ ends who calls it without them, and their end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
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
    return {number for number, (name, parent, _) in _processes().items() if name in _NEEDED and parent == os.getpid()}


def family(numbers: Iterable[int]) -> dict[int, str]:
    """Ids and start times of those of ``numbers`` that live, and of all that descend from them.

    To be asked for before the first of them ends: what is left is then nobody's child any more.
    """
    processes = _processes()
    found = {number: processes[number][2] for number in numbers if number in processes}
    more = True
    while more:
        below = {n: at for n, (_, parent, at) in processes.items() if parent in found and n not in found}
        found |= below
        more = bool(below)
    return found


def end_processes(found: Mapping[int, str]) -> None:
    """Kill those of a :func:`family` that still live; who has got the id of one that ended meanwhile is left alone."""
    processes = _processes()
    for number, at in found.items():
        if number in processes and processes[number][2] == at:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def _processes() -> dict[int, tuple[str, int, str]]:
    """Name, parent and start time of every process, by id; none where there is no /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            number, _, rest = stat.read_text().partition(" (")
            name, _, after = rest.rpartition(") ")
            fields = after.split()
            found[int(number)] = (name, int(fields[1]), fields[19])
    return found
