"""Where a study stands, as rows of a table and as one line."""

from __future__ import annotations

from datetime import timedelta

from was_search.service.asked import target_sentence
from was_search.studies.fitness import fitness_of, fitness_words
from was_search.studies.overview import Overview, Snapshot
from was_search.studies.slots import SlotState
from was_search.texts.protocol import EvaluationProtocol

_MOST_REASONS = 5


def status_rows(snapshot: Snapshot, found: Overview, gpu_price: float | None = None) -> list[list[str]]:
    """Rows of the status table; those of which nothing is known are left out."""
    fitness = fitness_of(snapshot.identity)
    counts = ", ".join(f"{found.counts[state]} {state.value}" for state in SlotState)
    best = found.best
    rows = [
        ["study", snapshot.name],
        ["state", " ".join(filter(None, [found.play, found.play_detail]))],
        ["trials", f"{found.finished} of {found.n_slots} finished: {counts}"],
        ["target", target_sentence(snapshot.identity)],
        ["fitness", str(snapshot.identity.get("fitness", fitness))],
        [
            "best",
            "no complete trial yet"
            if best is None or best.loss_nats is None
            else f"{fitness_words(fitness, best.loss_nats, best.nll_nats)} (slot {best.number}, {best.origin})",
        ],
    ]
    if best is not None and best.predicted_ms is not None and best.predicted_speedup is not None:
        words = f"{best.predicted_ms:.3f} ms predicted for the best, {best.predicted_speedup:.2f}x the dense step"
        rows.append(["decode step", words])
    if "search data" in snapshot.identity:
        rows.append(["on", EvaluationProtocol.from_json(snapshot.identity["search data"]).describe()])
    rows.append(["tokens saved", f"{100 * found.tokens_saved:.0f} % by stopping early"])
    if found.trials_per_minute is not None:
        rows.append(["speed", f"{found.trials_per_minute:.1f} trials/min"])
    if found.eta_seconds is not None:
        rows.append(["ETA", duration(found.eta_seconds)])
    if snapshot.runs:
        rows.append(["workers", _workers(snapshot, found)])
        for each in found.pool.quarantined:
            rows.append(["quarantined", f"{each.worker} since {each.since}: {each.reason}"])
        rows.append(["GPU hours", f"{found.gpu_hours:.2f} while searching"])
    if gpu_price is not None:
        rows.append(["cost", f"{found.gpu_hours * gpu_price:.2f} at {gpu_price:g} a GPU hour"])
    limits = ", ".join(_limit(name, value, snapshot) for name, value in vars(found.limits).items() if value)
    if limits:
        rows.append(["limits", limits])
    reasons = list(found.failures.items())
    rows += [[f"failed {n} x", reason] for reason, n in reasons[:_MOST_REASONS]]
    if reasons[_MOST_REASONS:]:
        rows.append(["failed", f"{sum(n for _, n in reasons[_MOST_REASONS:])} x for other reasons"])
    rows.append(["exported", str(snapshot.report.get("exported", {}).get("candidate", "not yet"))])
    return rows


def status_line(snapshot: Snapshot, found: Overview) -> str:
    """The status in one line."""
    parts = [f"{snapshot.now:%H:%M:%S} {snapshot.name}: {found.play}", f"{found.finished}/{found.n_slots} trials"]
    parts += [f"{found.counts[state]} {state.value}" for state in (SlotState.RUNNING, SlotState.FAILED)]
    if found.best is not None and found.best.loss_nats is not None:
        parts.append("best " + fitness_words(fitness_of(snapshot.identity), found.best.loss_nats, found.best.nll_nats))
    if found.trials_per_minute is not None:
        parts.append(f"{found.trials_per_minute:.1f} trials/min")
    if found.eta_seconds is not None:
        parts.append(f"ETA {duration(found.eta_seconds)}")
    if found.busy_share is not None:
        parts.append(f"{found.workers} worker(s) {100 * found.busy_share:.0f} % busy")
    return ", ".join(parts)


def _workers(snapshot: Snapshot, found: Overview) -> str:
    asked = snapshot.control.overrides.workers or found.pool.asked
    notes = [] if str(asked) in ("", str(found.workers)) else [f"{asked} asked for"]
    notes += [f"{n} {state}" for state, n in found.pool.counts.items() if n and state != "ready"]
    more = f" ({', '.join(notes)})" if notes else ""
    busy = "" if found.busy_share is None else f", evaluating {100 * found.busy_share:.0f} % of their time"
    return f"{found.workers}{more}{busy}"


def _limit(name: str, value: float, snapshot: Snapshot) -> str:
    spent = {"max_seconds": snapshot.shared.seconds, "max_gpu_seconds": snapshot.shared.gpu_seconds}.get(name, 0.0)
    return f"{name} {value:g}" + (f" ({spent:.0f} spent by other targets)" if spent else "")


def duration(seconds: float) -> str:
    """``seconds`` as h:mm:ss, with days where there are any."""
    return str(timedelta(seconds=round(seconds)))
