"""A study's figures for Prometheus, served by the coordinator while it searches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from was_search.coordinator.search_progress import SearchProgress
from was_search.errors import ResourceError
from was_search.service.addresses import parse_address

SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of the histogram of evaluations' durations."""


class StudyMetrics:
    """Prometheus metrics of one study, brought up to date by every :class:`SearchProgress`.

    Attributes:
        registry: holds these metrics, and none of the process.
    """

    def __init__(self, study: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self._study = study

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"was_search_{name}", text, ("study", *labels), registry=self.registry, **options)

        self._slots = make(Gauge, "slots", "Slots of the study by state.", "state")
        self._best = make(Gauge, "best_loss_nats", "Least loss of a complete slot, nats per token.")
        self._saved = make(Gauge, "tokens_saved_ratio", "Share of the tokens that stopping early left unread.")
        self._workers = make(Gauge, "workers", "Workers by state: ready, loading, pending, draining...", "state")
        self._evaluations = make(Counter, "evaluations", "Slots that this coordinator saw finish.", "state")
        self._tokens = make(Counter, "tokens", "Predicted tokens evaluated.")
        self._seconds = make(Histogram, "evaluation_seconds", "Duration of an evaluation.", buckets=SECONDS)

    def update(self, progress: SearchProgress) -> None:
        """Take in the state of the study, and the slot that has just finished, if one has."""
        complete = progress.finished - progress.stopped - progress.failed
        counts = {"complete": complete, "stopped": progress.stopped, "failed": progress.failed}
        for state, count in {**counts, "unfinished": progress.total - progress.finished}.items():
            self._slots.labels(self._study, state).set(count)
        if progress.best is not None and progress.best.loss_nats is not None:
            self._best.labels(self._study).set(progress.best.loss_nats)
        self._saved.labels(self._study).set(progress.saved)
        for state, count in progress.pool.counts.items():
            self._workers.labels(self._study, state).set(count)
        slot = progress.current
        if slot is not None:
            self._evaluations.labels(self._study, str(slot.state)).inc()
            self._tokens.labels(self._study).inc(slot.tokens)
            self._seconds.labels(self._study).observe(slot.seconds)


@contextmanager
def served(address: str, study: str) -> Iterator[Callable[[SearchProgress], None]]:
    """Serve a study's metrics at ``address``; gives the function that takes progress in. For "" it does nothing.

    Args:
        address: ``HOST:PORT``, or ``PORT`` on this machine alone.
        study: the study's name.

    Raises:
        ConfigError: not an address.
        ResourceError: the port cannot be listened on.
    """
    if not address:
        yield lambda progress: None
        return
    from prometheus_client import start_http_server

    host, port = parse_address(address)
    metrics = StudyMetrics(study)
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise ResourceError(f"metrics: cannot listen on {host}:{port} ({error}); choose another port") from error
    try:
        yield metrics.update
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
