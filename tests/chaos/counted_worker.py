"""A worker that keeps count: it writes a line when an evaluation begins and one when it has ended.

The coordinator writes into the same log when it looks for calls that are past their deadline.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from was_search.coordinator.calls import Call
from was_search.coordinator.model_calls import Evaluate
from was_workers.worker import Ids, Worker

T = TypeVar("T")

FOLDER = "WAS_CHAOS_FOLDER"
"""Environment variable that every process of a run has; it names the run's folder and marks them as ours."""


def vector_name(sparsities: Any) -> str:
    """A name for exactly these float64 numbers."""
    return hashlib.sha256(np.ascontiguousarray(sparsities, np.float64).tobytes()).hexdigest()[:16]


class CountedWorker(Worker):
    """The real worker; an evaluation is slower by the run's pace, which stands in for a larger model."""

    def run(self, call: Call[T], about: Ids | None = None) -> T:
        """See :meth:`was_workers.worker.Worker.run`."""
        if not isinstance(call, Evaluate):
            return super().run(call, about)
        folder, ids = Path(os.environ[FOLDER]), about or {}
        entry = {
            "pid": os.getpid(),
            "vector": vector_name(call.sparsities),
            **{name: ids.get(name) for name in ("study", "slot", "attempt")},
        }
        append(folder, {"event": "begun", "at": time.monotonic(), **entry})
        time.sleep(float((folder / "pace_seconds").read_text()))
        found = super().run(call, about)
        append(folder, {"event": "ended", "at": time.monotonic(), **entry})
        return found


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Write a line of the log that :class:`EvaluationLog` reads."""
    handle = os.open(folder / "evaluations.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(entry) + "\n").encode())  # one write: lines of several processes never mix
    finally:
        os.close(handle)


@dataclass
class Attempt:
    """One hand-out as its worker saw it; moments are those of the machine's monotonic clock, in seconds."""

    pid: int
    begun: float
    ended: float = math.inf


@dataclass
class EvaluationLog:
    """What the workers and the coordinators wrote, read on at each call of :meth:`read`.

    Attributes:
        begun: evaluations by vector.
        ended: those that came to their end.
        attempts: by study, slot and attempt.
        looks: moments at which a coordinator looked for calls past their deadline, by the process of a worker that had
            one.
    """

    folder: Path
    begun: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    attempts: dict[tuple[str, int, int], Attempt] = field(default_factory=dict)
    looks: dict[int, list[float]] = field(default_factory=dict)
    _at_work: dict[int, str] = field(default_factory=dict)
    _offset: int = 0

    def read(self) -> None:
        path = self.folder / "evaluations.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
        complete = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if entry["event"] == "looked":
            for pid in entry["workers"]:
                self.looks.setdefault(pid, []).append(entry["at"])
            return
        counts = self.begun if entry["event"] == "begun" else self.ended
        counts[entry["vector"]] = counts.get(entry["vector"], 0) + 1
        key = entry["study"], entry["slot"], entry["attempt"]
        if entry["event"] == "begun":
            self._at_work[entry["pid"]] = entry["vector"]
            self.attempts[key] = Attempt(entry["pid"], entry["at"])
        else:
            self._at_work.pop(entry["pid"], None)
            self.attempts[key].ended = entry["at"]

    def late_unseen(self, study: str, slot: int, attempt: int, deadline_seconds: float) -> bool:
        """Whether an evaluation was answered after its deadline and no coordinator had looked between the two.

        The deadline runs from its hand-out, which is a moment before the worker begins.
        """
        found = self.attempts.get((study, slot, attempt))
        if found is None or found.ended == math.inf:
            return False
        deadline = found.begun + deadline_seconds
        seen = any(deadline < at < found.ended for at in self.looks.get(found.pid, ()))
        return found.ended > deadline and not seen

    def at_work(self, pid: int) -> str | None:
        """The vector that process ``pid`` is evaluating, by its last line."""
        self.read()
        return self._at_work.get(pid)
