"""Real workers in this process, in the place of Ray's: for tests of the service that say nothing about Ray.

A search on Ray pays for its processes: 6 s of processor for Ray itself and 5 s for each worker, which imports and loads
what this process has imported and loaded already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import was_workers.cluster
import was_workers.pool
from benchmarks.harness.pool_double import Given, PoolDouble
from was_search.coordinator.health import QuarantinePolicy
from was_search.studies.worker_range import WorkerRange
from was_workers.cluster import Cluster
from was_workers.worker import Worker, WorkerInfo, WorkerSpec


class PoolHere(PoolDouble):
    """Takes the arguments of ``was_workers.pool.Pool``; all its workers share one model, and their calls end in order.

    Attributes:
        infos: of the workers.
    """

    def __init__(
        self,
        cluster: Cluster,
        spec: WorkerSpec,
        *,
        n_workers: WorkerRange,
        gpus_per_worker: float,
        useful: int | None = None,
        divide_threads: bool = False,
        policy: QuarantinePolicy | None = None,
    ) -> None:
        super().__init__(self._run, n_workers.least, policy=policy, gpus_per_worker=gpus_per_worker)
        self._worker = Worker(spec)
        self.infos: list[WorkerInfo] = []

    def _run(self, given: Given) -> Any:
        return self._worker.run(given.call, given.about)

    def __enter__(self) -> PoolHere:
        return self

    def __exit__(self, *_: object) -> None:
        self.given.clear()

    def wait_for_least(self) -> None:
        """Load the model."""
        self.infos = [self._worker.prepare()] * self.n_loaded


@contextmanager
def _no_ray(ray_option: str, *, workers: int) -> Iterator[Cluster]:
    yield Cluster(True, "here", float(workers), 0.0)


@contextmanager
def workers_here() -> Iterator[None]:
    """Inside the block every Context starts its workers here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(was_workers.cluster, "connect", _no_ray)
        patch.setattr(was_workers.pool, "Pool", PoolHere)
        yield
