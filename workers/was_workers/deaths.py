"""Why a worker's process is gone: Ray's paragraphs in a line of ours, with what may help."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError

from was_search.errors import WasError

_MEMORY = re.compile(r"\(IP: ([^,]+),.*?\) was (\S+) used / (\S+) limit")
"""In an OutOfMemoryError: the node, what was used of its memory, and what it has."""

_EXIT_CODE = re.compile(r"exits with an exit code (\d+)")
_CUT_OFF = "connection error code 2"
"""What Ray says of a process that ended without a word: by a signal."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 300

_IN_THE_LOG = "its log is in Ray's log folder on that node, /tmp/ray/session_latest/logs/worker-*.err"


@dataclass(frozen=True)
class Death:
    """A process's end.

    Attributes:
        reason: in one line.
        remedy: what may help; "" where nothing is known.
        again: whether another process would surely end in the same way.
        node_gone: its node went, which says nothing about another process.
    """

    reason: str
    remedy: str = ""
    again: bool = False
    node_gone: bool = False

    @property
    def words(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


def death_of(error: BaseException) -> Death:
    """What Ray or a call of ours says about the end of a worker's process."""
    words = _COLOURS.sub("", str(error))
    if isinstance(error, OutOfMemoryError):
        return Death(
            f"Ray ended it because its node is short of memory{_used(words)}",
            "fewer --workers, a smaller --batch-size, a narrower --dtype, or a machine with more memory that is free; "
            "RAY_memory_usage_threshold says how full a node may get (0.95 of its memory)",
        )
    if isinstance(error, ActorDiedError):
        return _death_of_actor(error, words)
    name = "" if isinstance(error, WasError | TimeoutError) else f"{type(error).__name__}: "
    return Death(name + _first_line(words))


def _used(words: str) -> str:
    found = _MEMORY.search(words)
    return f" ({found[2]} of {found[3]} used on {found[1]})" if found else ""


def _death_of_actor(error: RayError, words: str) -> Death:
    node = re.search(r"\bip[:=]\s*([^\s,)]+)", words)
    where = f" on {node[1]}" if node else ""
    if getattr(error, "actor_init_failed", False):
        advice = "install what is missing on that node: the coordinator ships was-search, and nothing else"
        return Death(f"its code cannot be imported{where} ({_last_line(words)})", advice, again=True)
    if code := _EXIT_CODE.search(words):
        return Death(f"its process ended with status {code[1]}{where}", _IN_THE_LOG)
    if _CUT_OFF in words:
        advice = "the system does that when memory runs out ('dmesg' says so): fewer --workers; else it crashed: "
        return Death(f"its process was killed by a signal{where}", advice + _IN_THE_LOG)
    if "node has died" in words or "node died" in words:
        return Death(f"its node is gone{where}", "look at that machine, and at 'ray status'", node_gone=True)
    return Death(_last_line(words))


def _first_line(words: str) -> str:
    return _cut((words.strip().splitlines() or [""])[0])


def _last_line(words: str) -> str:
    return _cut((words.strip().splitlines() or [""])[-1])


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
