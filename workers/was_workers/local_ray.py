"""The processes of a local Ray: whether they live, since Ray's C++ ends who calls it without them, and their end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from psutil import NoSuchProcess, Process

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


def ray_processes() -> set[Process]:
    """The raylets and control stores that this process has started and not waited for."""
    found = set()
    for each in Process().children():
        with suppress(NoSuchProcess):  # it has ended meanwhile
            if each.name() in _NEEDED:
                found.add(each)
    return found


def family(processes: Iterable[Process]) -> list[Process]:
    """Those of ``processes`` that live, and all that descend from them.

    To be asked for before the first of them ends: what is left is then nobody's child any more.
    """
    found = []
    for each in processes:
        with suppress(NoSuchProcess):
            found += [each, *each.children(recursive=True)] if each.is_running() else []
    return found


def end_processes(processes: Iterable[Process]) -> None:
    """Kill those that still live; who has got the id of one that ended meanwhile is left alone."""
    for each in processes:
        with suppress(NoSuchProcess):
            each.kill()
