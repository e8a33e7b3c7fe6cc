"""One whole job, from a model to a plan, and where its time went: what a row of the scaling benchmark holds."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.progress import JsonReporter
from was_search.service.settings import Settings
from was_search.service.steps.main_job import RunResult, run
from was_search.studies.origin import OriginKind
from was_search.studies.overview import overview
from was_search.texts.protocol import content_hash

PHASES = ("start", "calibrate", "seed", "descents", "trials", "compensate", "export", "other")
"""Parts of a job in their order: Ray and the model's loading; the dense model's histograms; tables and seeds; the
search while a descent is on a worker, and its other time; the compensation; confirmation and test figures; what no
phase tells of, such as imports, tokens, the database and files."""

DESCENTS = "was_search.coordinator.descents"


def run_job(settings: Settings, folder: Path) -> dict[str, Any]:
    """Run a job in this process, and measure it. Its database must be empty, or phases are taken from the cache.

    On CPUs each worker has one thread. ``folder`` gets the job's events, and its plan if the settings name none.
    Processor time is that of this process: Postgres, Ray and its workers are others.
    """
    from was_storage.studies.overview import read_snapshot

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "events.jsonl"
    started, worked = time.perf_counter(), time.process_time()
    descents = InFlight()
    with (
        path.open("w", encoding="utf-8") as events,
        redirect_stdout(events),
        listening(DESCENTS, descents),
        Context(settings, JsonReporter()) as context,
        one_thread() if context.placement.device == "cpu" else nullcontext(),
    ):
        pool = context.pool
        ready = time.perf_counter()
        found = run(context)
        ended = time.perf_counter()
        snapshot = read_snapshot(context.database, found.search.study)
        held, done = pool.n_workers * (ended - ready), pool.work_done
        figures: dict[str, Any] = {
            "seconds": {"total": round(ended - started, 3)},
            "finished": overview(snapshot).finished,
            "busy_share": done.busy_seconds / held,
            "gpu_hours": pool.gpus_per_worker * pool.n_workers * (ended - started) / 3600,
            "stored_bytes": done.stored_bytes,
            "calls": done.calls,
            "coordinator_cpu_seconds": time.process_time() - worked,
            "device": pool.infos[0].device if pool.gpus_per_worker else "cpu",
            "placement": vars(context.placement),
            "model": {"name": context.model.source.display_name, "fingerprint": context.model.fingerprint},
        }
    searched = snapshot.runs[-1].seconds
    told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    phases = phase_seconds(told)
    phases |= {"descents": descents.seconds, "trials": searched - descents.seconds}
    phases["other"] = max(0.0, figures["seconds"]["total"] - sum(phases.values()))
    figures["seconds"] |= {name: round(phases.get(name, 0.0), 3) for name in PHASES}
    figures["told"] = told_seconds(told)
    figures["trials_per_minute"] = 60 * figures["finished"] / max(phases["trials"], 1e-9)
    return figures | result_hashes(found)


def phase_seconds(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the phases that ``--json`` tells of, by :data:`PHASES`; those of the search are not among them."""
    seconds: Counter[str] = Counter()
    for name, lasted, searched in _ended_phases(events):
        seconds[phase_of(name, searched=searched)] += lasted
    return dict(seconds)


def told_seconds(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of what ``--json`` tells of, by its own names: the parts of :data:`PHASES`."""
    seconds: Counter[str] = Counter()
    for name, lasted, _ in _ended_phases(events):
        seconds[name] += lasted
    return {name: round(value, 3) for name, value in seconds.items()}


def _ended_phases(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float, bool]]:
    """Name and seconds of each phase that has ended, and whether it did after the search began."""
    searched = False
    for event in events:
        searched |= event["event"] in ("trial", "search")
        if event["event"] == "phase" and event["state"] in ("finished", "cached"):
            yield event["name"], event["seconds"], searched


def phase_of(name: str, *, searched: bool) -> str:
    """Which of :data:`PHASES` a phase of a reporter belongs to; ``searched`` says that it came after the search."""
    if name.startswith(("start Ray", "load the model")):
        return "start"
    if not searched:
        return "calibrate" if name.startswith("calibrate on") else "seed"
    corrected = "compensat" in name and not name.startswith("evaluate")
    return "compensate" if corrected or name.startswith("dense top") else "export"


def result_hashes(found: RunResult) -> dict[str, Any]:
    """What must not depend on the number of workers, as hashes.

    ``plan_hash`` is of the plan's sparsities and thresholds. ``descended_hash`` is of the vectors of seeds and
    descents, and of the seeds' losses. With more workers than half the sampler's lag what it suggests, and how early
    its trials stop, depend on which others have ended by then, so that plans may differ.
    """
    assert found.plan is not None
    plan = Plan.load(found.plan)
    kinds = {OriginKind.SEED: True, OriginKind.DESCENT: False}
    before = sorted((s for s in found.search.slots if s.source.kind in kinds), key=lambda s: s.origin)
    vectors = [[s.origin, np.asarray(s.sparsities), s.loss_nats if kinds[s.source.kind] else None] for s in before]
    return {
        "plan_hash": content_hash("plan", plan.sparsities, plan.thresholds),
        "descended_hash": content_hash("descended", vectors),
        "origin": plan.provenance["origin"],
        "test": plan.metrics["test"],
    }


class InFlight(logging.Handler):
    """Adds up the time in which at least one descent is on a worker, from what the coordinator logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._running = 0
        self._since = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "descent handed out":
            self._since = self._since if self._running else record.created
            self._running += 1
        elif record.getMessage() in ("descent ended", "descent put back"):
            self._running -= 1
            self.seconds += 0.0 if self._running else record.created - self._since


@contextmanager
def listening(name: str, handler: logging.Handler) -> Iterator[None]:
    """``handler`` gets what the logger ``name`` says inside the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def one_thread() -> Any:
    """Workers that are started inside the block share a machine of one processor each: a thread for each of them."""
    return mock.patch("was_workers.threads.os", SimpleNamespace(cpu_count=lambda: 1))
