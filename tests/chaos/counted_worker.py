"""A worker that keeps count: it writes a line when an evaluation begins and one when it has ended."""

from __future__ import annotations

import hashlib
import json
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
        folder, vector = Path(os.environ[FOLDER]), vector_name(call.sparsities)
        _append(folder, {"event": "begun", "pid": os.getpid(), "vector": vector})
        time.sleep(float((folder / "pace_seconds").read_text()))
        found = super().run(call, about)
        _append(folder, {"event": "ended", "pid": os.getpid(), "vector": vector})
        return found


def _append(folder: Path, entry: dict[str, Any]) -> None:
    handle = os.open(folder / "evaluations.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(entry) + "\n").encode())  # one write: lines of several workers never mix
    finally:
        os.close(handle)


@dataclass
class EvaluationLog:
    """What the workers wrote, read on at each call of :meth:`read`."""

    folder: Path
    begun: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
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
            entry = json.loads(line)
            counts = self.begun if entry["event"] == "begun" else self.ended
            counts[entry["vector"]] = counts.get(entry["vector"], 0) + 1
            if entry["event"] == "begun":
                self._at_work[entry["pid"]] = entry["vector"]
            else:
                self._at_work.pop(entry["pid"], None)

    def at_work(self, pid: int) -> str | None:
        """The vector that process ``pid`` is evaluating, by its last line."""
        self.read()
        return self._at_work.get(pid)
