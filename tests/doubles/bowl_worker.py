"""Workers without a model for real Ray: an evaluation is a bowl and takes as long as it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def bowl_worker(folder: Path, *, seconds: float = 0.1) -> type:
    """A class for the pool; made here, so that Ray ships it by value.

    Files in ``folder`` tell its processes what to do: ``slow-N`` makes the Nth worker of the pool (from 0)
    sleep as many seconds as the file says, ``held-N`` keeps it in its evaluation until the file is removed,
    ``failing-N`` makes it die at every evaluation, restarted or not, until the file is removed. Each evaluation or
    shard appends a line to ``evaluations``.
    """

    class BowlWorker:
        def __init__(self, spec: Any, number: int = 0) -> None:
            self.spec = spec
            self.number = number

        def place(self) -> Any:
            import os

            import ray

            from was_workers.worker import Place

            return Place(ray.get_runtime_context().get_node_id(), "host", os.getpid())

        def prepare(self) -> Any:
            import os

            from was_search import __version__
            from was_workers.worker import WorkerInfo

            return WorkerInfo("host", os.getpid(), "cpu", None, __version__, 0.0)

        def set_threads(self, n: int) -> None:
            import dataclasses

            self.spec = dataclasses.replace(self.spec, threads=n)

        def threads(self) -> int:
            return int(self.spec.threads)

        def where(self) -> tuple[int, str]:
            import ray

            return self.number, ray.get_runtime_context().get_node_id()

        def nap(self, seconds: float) -> int:
            import time

            time.sleep(seconds)
            return self.number

        def run(self, call: Any, about: Any = None) -> Any:
            self.about = about
            # By its name: to import the class is to import torch, in a first call whose seconds are looked at.
            return self.evaluate(call.sparsities) if call.name == "evaluation" else call.run(self)

        def shard(self, value: Any) -> Any:
            """A part of a phase: as long as an evaluation, and as easily disturbed."""
            self._work()
            return value, self.number, self.about

        def evaluate(self, sparsities: Any) -> Any:
            import numpy as np

            from was_search.texts.protocol import Evaluation

            self._work()
            loss = 2.0 + float(np.square(sparsities - 0.6).sum())
            return Evaluation(np.full(4, loss), 400, 0.0, False, sparsities)

        def _work(self) -> None:
            import os
            import signal
            import time

            slow, failing = folder / f"slow-{self.number}", folder / f"failing-{self.number}"
            with (folder / "evaluations").open("a") as file:
                file.write(f"{self.number} {os.getpid()}\n")
            if failing.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(float(slow.read_text()) if slow.exists() else seconds)
            while (folder / f"held-{self.number}").exists():
                time.sleep(0.05)

    return BowlWorker


def evaluations(folder: Path) -> list[int]:
    """The numbers of the workers that began an evaluation, in that order."""
    path = folder / "evaluations"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []
