"""Opens what a command works with: database, cache, cluster and workers, each when it is first needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING

from was_search.process import logs
from was_search.service.model import Model
from was_search.service.placement import Placement, placed_here, placed_on_workers
from was_search.service.reports.progress import Advance, Reporter
from was_search.service.settings import Settings
from was_search.studies.pool_state import PoolState

if TYPE_CHECKING:
    from was_search.service.watching.notify import Announcement
    from was_storage.server.database import Database
    from was_storage.studies.cache import ArtifactCache
    from was_workers.cluster import Cluster
    from was_workers.pool import Pool


class Context:
    """Opens what steps need, lazily: what is cached starts no Ray and loads no model.

    A context manager; owns the database and the Ray connection and closes both.
    """

    def __init__(self, settings: Settings, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = reporter or Reporter()
        self.announcement: Announcement | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @cached_property
    def database(self) -> Database:
        from was_storage.server.database import Database

        return self._stack.enter_context(Database.open(self.settings.storage))

    @cached_property
    def cache(self) -> ArtifactCache:
        from was_storage.studies.cache import ArtifactCache

        return ArtifactCache(self.database)

    @cached_property
    def model(self) -> Model:
        """The settings' model, found but not loaded."""
        return Model.of(self.settings, self.lasting)

    @cached_property
    def cluster(self) -> Cluster:
        from was_workers.cluster import connect

        with self.reporter.phase("start Ray"):
            return self._stack.enter_context(connect(self.settings.ray, workers=self.settings.worker_range.least))

    @cached_property
    def placement(self) -> Placement:
        """Device and dtype of the workers, decided before any is started.

        Raises:
            ResourceError: a GPU was asked for and there is none.
        """
        return placed_on_workers(self.settings, lambda: self.cluster)

    @cached_property
    def placement_here(self) -> Placement:
        """Device and dtype of the steps that run in this process, whatever a cluster has.

        Raises:
            ResourceError: a GPU was asked for and there is none.
        """
        return placed_here(self.settings, lambda: self.model.source)

    @cached_property
    def pool(self) -> Pool:
        """The workers; the first of a fixed number, or the least of a range, is ready when this returns."""
        from was_search.checkpoints.empty_model import empty_model
        from was_search.coordinator.health import QuarantinePolicy
        from was_workers.pool import Pool
        from was_workers.worker import WorkerSpec

        settings, placement, source = self.settings, self.placement, self.model.source
        spec = WorkerSpec(
            model=source.location,
            revision=source.revision,
            dtype=placement.dtype,
            device=placement.device,
            score=settings.score,
            masks=settings.masks,
            log_format=logs.configured(),
            spread=placement.gpus_per_worker > 1,
            weights=settings.weights,
        )
        policy = QuarantinePolicy(
            settings.quarantine_slowdown, settings.quarantine_failures, settings.quarantine_seconds
        )
        # What no worker would load is refused here. Transformers takes as long to import as Ray and workers to start.
        with ThreadPoolExecutor(1) as beside:
            checked = beside.submit(empty_model, source)
            cluster = self.cluster
            with self.reporter.phase(f"load the model on {settings.workers} worker(s)"):
                pool = self._stack.enter_context(
                    Pool(
                        cluster,
                        spec,
                        n_workers=settings.worker_range,
                        gpus_per_worker=placement.gpus_per_worker,
                        useful=settings.trials,
                        divide_threads=cluster.local,
                        policy=policy,
                    )
                )
                checked.result()
                pool.wait_for_least()
        return pool

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """The reporter's phase of this name, on the workers."""
        return self.reporter.phase(name, total, self._workers)

    def lasting(self, name: str) -> AbstractContextManager[Advance]:
        """A phase of this process that is over at once most times, and only shown where it lasts."""
        return self.reporter.phase(name, least_seconds=5.0)

    def _workers(self) -> PoolState:
        """Of the pool if there is one; a bar's own thread asks, which must not start it."""
        pool: Pool | None = vars(self).get("pool")
        return PoolState() if pool is None else pool.state
