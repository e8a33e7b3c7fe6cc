"""Where a study stands, computed from what the database holds of it: for status, dashboards and metrics."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from was_search.process.plain_json import finite
from was_search.studies.control import NOTHING_SPENT, Control, EndingKind, Limits, Spent, Wish, limits_of
from was_search.studies.fitness import fitness_of
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import SlotState, share_saved
from was_search.texts.protocol import perplexity

_WORKER = re.compile(r"\bworker-\d+(?:@\S*[^\s:])?")


@dataclass(frozen=True)
class SlotLine:
    """A slot without its arrays; ``sequences`` is how many losses it has.

    ``predicted_ms`` is the time of a decoding step and ``predicted_speedup`` that over the dense one, where a profile
    was known.
    """

    number: int
    state: SlotState
    origin: str
    loss_nats: float | None
    nll_nats: float | None
    sequences: int
    seconds: float
    started_at: datetime | None
    finished_at: datetime | None
    error: str = ""
    predicted_ms: float | None = None
    predicted_speedup: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """One coordinator's turn at a study, as it wrote it down.

    Attributes:
        coordinator: host and process id.
        seen_at: when it last wrote.
        ended_at: None while it runs, and for ever where it died.
        ending: an :class:`was_search.studies.control.EndingKind`, "" before the end.
        detail: why it ended; before the end what it does besides evaluations.
        workers: size of its pool.
        seconds: time of searching, pauses left out.
        worker_seconds: time of workers that held the model.
        gpu_seconds: time of their GPUs.
        pool: a :class:`was_search.studies.pool_state.PoolState` as JSON, {} where it is not known.
    """

    epoch: int
    coordinator: str
    started_at: datetime
    seen_at: datetime
    ended_at: datetime | None
    ending: str
    detail: str
    paused: bool
    workers: int
    gpus_per_worker: float
    seconds: float
    worker_seconds: float
    gpu_seconds: float
    pool: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What the database holds of a study at ``now``, its own clock.

    ``alive`` says that a coordinator holds the study; ``runs`` are in their order; ``elsewhere`` is what other studies
    of its command have spent of the limits on time.
    """

    name: str
    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    control: Control
    slots: Sequence[SlotLine]
    runs: Sequence[RunRecord]
    alive: bool
    epoch: int
    now: datetime
    elsewhere: Spent = NOTHING_SPENT

    @property
    def shared(self) -> Spent:
        """The part of ``elsewhere`` that counts for this study's limits."""
        return self.control.overrides.shared(self.elsewhere)


@dataclass(frozen=True)
class Overview:
    """Figures of a study, made by :func:`overview`.

    Attributes:
        play: one word: starting, running, paused, draining, cancelling, finished, stopped, drained, cancelled,
            failed, lost (its coordinator went away without a word) or idle.
        play_detail: by whom since when, which rule, or which error.
        counts: slots by state.
        best: the best complete slot.
        tokens_saved: share of tokens that stopping early saved.
        trials_per_minute: finished in the last run, by its time without pauses; None before one has.
        eta_seconds: until the last slot, or until ``max_seconds``; None where nothing runs or nothing is known.
        busy_share: evaluations' time over the time that workers held the model, in the last run; None before.
            Descents count as idle.
        gpu_hours: of GPUs held while searching, all runs together.
        failures: failed slots by reason.
        limits: those that hold now.
        workers: size of the last run's pool, without workers that wait for a place, go, or are in quarantine.
        pool: all workers of the last run's pool, by state.
    """

    play: str
    play_detail: str
    counts: dict[SlotState, int]
    best: SlotLine | None
    tokens_saved: float
    trials_per_minute: float | None
    eta_seconds: float | None
    busy_share: float | None
    gpu_hours: float
    failures: dict[str, int]
    limits: Limits
    workers: int
    pool: PoolState

    @property
    def n_slots(self) -> int:
        return sum(self.counts.values())

    @property
    def finished(self) -> int:
        return sum(n for state, n in self.counts.items() if state.finished)

    @property
    def best_perplexity(self) -> float | None:
        return None if self.best is None or self.best.nll_nats is None else perplexity(self.best.nll_nats)


def overview(snapshot: Snapshot) -> Overview:
    """The figures of ``snapshot``."""
    slots = snapshot.slots
    counts = {state: sum(slot.state is state for slot in slots) for state in SlotState}
    complete = [s for s in slots if s.state is SlotState.COMPLETE and s.loss_nats is not None]
    seen = [s.sequences for s in slots if s.state in (SlotState.COMPLETE, SlotState.STOPPED) and s.sequences]
    run = snapshot.runs[-1] if snapshot.runs else None
    running = snapshot.alive and run is not None and run.epoch == snapshot.epoch
    limits = snapshot.control.overrides.limits(limits_of(snapshot.config))
    play, detail = _play(snapshot, run if running else None, run)
    # What has passed since the coordinator last wrote is added as if nothing had changed.
    unseen = max(0.0, (snapshot.now - run.seen_at).total_seconds()) if run is not None and running else 0.0
    rate = None if run is None else _rate(slots, run, unseen)
    unfinished = counts[SlotState.WAITING] + counts[SlotState.RUNNING]
    eta = None
    if running and run is not None and not run.paused and rate:
        eta = 60.0 * unfinished / rate
        if limits.max_seconds:
            spent = sum(r.seconds for r in snapshot.runs) + unseen
            eta = max(0.0, min(eta, limits.max_seconds - snapshot.shared.seconds - spent))
    gpu_seconds = sum(r.gpu_seconds for r in snapshot.runs)
    if run is not None:
        gpu_seconds += unseen * run.workers * run.gpus_per_worker
    return Overview(
        play=play,
        play_detail=detail,
        counts=counts,
        best=min(complete, key=lambda s: (s.loss_nats, s.number), default=None),
        tokens_saved=share_saved(seen),
        trials_per_minute=rate,
        eta_seconds=eta,
        busy_share=None if run is None else _busy(slots, run, snapshot.now, unseen),
        gpu_hours=gpu_seconds / 3600.0,
        failures=failures_by_reason(slots),
        limits=limits,
        workers=0 if run is None else run.workers,
        pool=PoolState.from_json({} if run is None else run.pool),
    )


def failures_by_reason(slots: Sequence[SlotLine]) -> dict[str, int]:
    """Failed slots by the first line of their error without workers' names, the commonest first."""
    found: Counter[str] = Counter()
    for slot in slots:
        if slot.state is SlotState.FAILED:
            line = (slot.error.strip().splitlines() or ["no reason given"])[0]
            found[_WORKER.sub("a worker", line)[:200]] += 1
    return dict(found.most_common())


def _play(snapshot: Snapshot, current: RunRecord | None, last: RunRecord | None) -> tuple[str, str]:
    """The state of play in one word, and what there is to say about it."""
    if snapshot.alive and current is None:
        return "starting", "a coordinator has taken the study over"
    if current is not None:
        by = f"by {current.coordinator} since {current.started_at:%Y-%m-%d %H:%M:%S %Z}".rstrip()
        words = {Wish.DRAIN: "draining", Wish.CANCEL: "cancelling"}
        if snapshot.control.wish in words:
            return words[snapshot.control.wish], by
        if current.paused:
            return "paused", by
        return "running", f"{current.detail}, {by}" if current.detail else by
    if snapshot.slots and all(slot.state.finished for slot in snapshot.slots):
        return "finished", ""
    if last is None:
        return "idle", "no coordinator is running it"
    when = f"{last.ended_at or last.seen_at:%Y-%m-%d %H:%M:%S %Z}".rstrip()
    if last.ended_at is None:
        return "lost", f"its coordinator {last.coordinator} went away, last seen {when}; the same command goes on"
    if last.ending == EndingKind.FINISHED:
        return "idle", f"was finished {when} and has got more slots since"
    return last.ending or "idle", ", ".join(filter(None, [last.detail, when]))


def _of_run(slots: Sequence[SlotLine], run: RunRecord) -> list[SlotLine]:
    """The slots that finished during ``run``."""
    return [s for s in slots if s.state.finished and s.finished_at is not None and s.finished_at >= run.started_at]


def _rate(slots: Sequence[SlotLine], run: RunRecord, unseen: float) -> float | None:
    done, seconds = len(_of_run(slots, run)), run.seconds + (0.0 if run.paused else unseen)
    return 60.0 * done / seconds if done and seconds > 0 else None


def _busy(slots: Sequence[SlotLine], run: RunRecord, now: datetime, unseen: float) -> float | None:
    held = run.worker_seconds + unseen * run.workers
    if held <= 0:
        return None
    busy = 0.0
    for slot in _of_run(slots, run):
        assert slot.finished_at is not None
        busy += min(slot.seconds, (slot.finished_at - run.started_at).total_seconds())
    if run.ended_at is None:
        for slot in slots:
            if slot.state is SlotState.RUNNING and slot.started_at is not None:
                busy += max(0.0, (min(now, run.seen_at if not unseen else now) - slot.started_at).total_seconds())
    return min(1.0, busy / held)


def to_json(snapshot: Snapshot, found: Overview, gpu_price: float | None = None) -> dict[str, Any]:
    """``found`` as JSON for programs; ``gpu_price``, of a GPU hour, adds a cost."""
    best = found.best
    run = snapshot.runs[-1] if snapshot.runs else None
    return {
        "study": snapshot.name,
        "state": found.play,
        "state_detail": found.play_detail,
        "wish": snapshot.control.wish.value,
        "coordinator": run.coordinator if run is not None and snapshot.alive else None,
        "started_at": run.started_at.isoformat() if run is not None else None,
        "n_slots": found.n_slots,
        "finished": found.finished,
        "counts": {state.value: n for state, n in found.counts.items()},
        "fitness": fitness_of(snapshot.identity),
        "best_slot": best.number if best else None,
        "best_loss_nats": best.loss_nats if best else None,
        "best_perplexity": finite(found.best_perplexity),
        "best_predicted_ms": best.predicted_ms if best else None,
        "best_predicted_speedup": best.predicted_speedup if best else None,
        "tokens_saved": found.tokens_saved,
        "trials_per_minute": found.trials_per_minute,
        "eta_seconds": found.eta_seconds,
        "workers": found.workers,
        "pool": found.pool.to_json(),
        "busy_share": found.busy_share,
        "gpu_hours": found.gpu_hours,
        "cost": None if gpu_price is None else found.gpu_hours * gpu_price,
        "failures": found.failures,
        "limits": vars(found.limits),
        "spent_by_other_targets": vars(snapshot.shared),
        "overrides": snapshot.control.overrides.given,
        "identity": snapshot.identity,
        "report": snapshot.report,
    }
