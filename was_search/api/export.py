"""Step 4: the plan. The winner is re-calibrated at its own point, checked against the seed, and written."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from was_search import __version__
from was_search.api.calibrate import Calibration, OperatingPoint, calibrate, operating_point
from was_search.api.context import Context, pack_array, unpack_array
from was_search.api.search import SearchResult, report_study
from was_search.errors import StudyError
from was_search.plan import Plan
from was_search.protocol import Evaluation, content_hash, perplexity
from was_search.shape import FloatArray
from was_search.slots import Slot


@dataclass(frozen=True)
class Candidate:
    """A vector with the name it has in tables."""

    name: str
    sparsities: FloatArray


@dataclass(frozen=True)
class Figures:
    """One evaluation of one candidate on one split, with what was counted."""

    evaluation: Evaluation
    split: str
    achieved: float

    def to_json(self, context: Context) -> dict[str, Any]:
        return {
            "loss_nats": self.evaluation.loss_nats,
            "perplexity": perplexity(self.evaluation.loss_nats),
            "achieved_sparsity": self.achieved,
            "tokens": self.evaluation.tokens,
            "protocol": context.tokens(self.split).protocol.to_json(),
        }


def measure(
    context: Context, calibration: Calibration, candidate: Candidate | None, split: str, point: OperatingPoint | None
) -> Figures:
    """Evaluate a candidate's own operating ``point`` (or the dense model for None) on ``split``; cached."""
    data = context.tokens(split)
    thresholds = None if point is None else point.thresholds
    key = content_hash(
        "evaluation", 1, context.fingerprint, context.settings.score, data.protocol, context.placement.device, thresholds
    )
    started = time.perf_counter()
    found = context.cache.get("evaluation", key)
    name = "dense" if candidate is None else candidate.name
    label = f"evaluate {name} on {split}"
    if found is not None:
        context.reporter.cached(label, data.protocol.describe(), time.perf_counter() - started)
        packed = unpack_array(found.payload)
        evaluation = Evaluation(
            packed, int(found.meta["tokens"]), float(found.meta["seconds"]), False, np.asarray(found.meta["achieved"])
        )
    else:
        with context.reporter.phase(label):
            (evaluation,) = context.pool.map([("evaluate_thresholds", data, thresholds)])
        meta = {"tokens": evaluation.tokens, "seconds": evaluation.seconds, "achieved": evaluation.achieved.tolist()}
        context.cache.put("evaluation", key, pack_array(evaluation.losses), meta)
    return Figures(evaluation, split, calibration.shape.sparsity(evaluation.achieved))


def export(context: Context, result: SearchResult | None = None) -> Path:
    """Write the plan of the study's best vector; returns its folder.

    The winner and the best seed are re-calibrated at their own points and compared on the search split at equal
    achieved sparsity; the better one is exported, and the plan says which.

    Raises:
        StudyError: no such study, or none of its slots is complete.
    """
    from was_storage.studies import StudyStore

    result = result or stored_result(context)
    best = result.best
    if best is None or best.sparsities is None:
        raise StudyError(f"study {result.study!r} has no complete trial yet; run 'was-search search' first")
    calibration = calibrate(context)
    contenders = [(Candidate(f"best (slot {best.number})", best.sparsities), best)]
    if not best.origin.startswith("seed:"):
        seeds = [s for s in result.slots if s.origin == "seed:fisher" and s.sparsities is not None]
        contenders += [(Candidate("fisher seed", _array(slot.sparsities)), slot) for slot in seeds]
    measured = []
    for candidate, slot in contenders:
        point = operating_point(context, calibration, candidate.sparsities, candidate.name)
        measured.append((measure(context, calibration, candidate, "search", point), point, candidate, slot))
    figures, point, candidate, slot = min(measured, key=lambda entry: entry[0].evaluation.loss_nats)
    if slot is not best:
        context.reporter.note(
            f"re-calibrated, the {candidate.name} is better on the search split than slot {best.number}: it is exported"
        )
    test = measure(context, calibration, candidate, "test", point)
    dense = {split: measure(context, calibration, None, split, None).to_json(context) for split in ("search", "test")}
    folder = context.default_plan_folder(result.study)
    metrics = {"search": figures.to_json(context), "test": test.to_json(context), "dense": dense}
    plan = Plan(
        model=context.source.display_name,
        revision=context.source.revision,
        fingerprint=context.fingerprint,
        shape=calibration.shape,
        score=context.settings.score,
        budget=context.settings.target,
        dense_prefix=context.settings.dense_prefix,
        sparsities=candidate.sparsities,
        thresholds=point.thresholds,
        norms=_norms(context, calibration),
        achieved={
            "calibration": calibration.shape.sparsity(point.achieved),
            "search": figures.achieved,
            "test": test.achieved,
        },
        metrics=metrics,
        provenance=_provenance(context, result, slot, point),
    )
    plan.save(folder)
    store = StudyStore(context.database)
    store.set_report(
        result.study,
        {
            "exported": {"slot": slot.number, "candidate": candidate.name, "achieved": plan.achieved},
            "metrics": metrics,
        },
    )
    report_study(context, result, calibration)
    return folder


def stored_result(context: Context) -> SearchResult:
    """The study of the settings as it stands in the database, without running anything of it."""
    from was_search.api.search import study_name
    from was_search.api.seed import seed
    from was_storage.studies import StudyStore

    name = study_name(context)
    store = StudyStore(context.database)
    store.get(name)
    slots = store.slots(name)
    return SearchResult(name, slots, seed(context), drained=False)


def _norms(context: Context, calibration: Calibration) -> tuple[tuple[Any, ...], ...]:
    key = content_hash("norms", 1, context.fingerprint, context.settings.score, context.placement.dtype)
    found = context.cache.get("norms", key)
    shape = calibration.shape
    if found is not None:
        flat = unpack_array(found.payload)
    else:
        (rows,) = context.pool.map([("norms",)])
        flat = np.concatenate([norm for row in rows for norm in row])
        context.cache.put("norms", key, pack_array(flat))
    ends = np.cumsum([width for row in shape.in_features for width in row])
    parts = iter(np.split(flat, ends[:-1]))
    return tuple(tuple(next(parts) for _ in row) for row in shape.in_features)


def _provenance(context: Context, result: SearchResult, slot: Slot, point: OperatingPoint) -> dict[str, Any]:
    from importlib.metadata import version

    settings = dataclasses.asdict(context.settings)
    del settings["storage"]
    return {
        "study": result.study,
        "slot": slot.number,
        "origin": slot.origin,
        "trial_loss_nats": slot.loss_nats,
        "calibration_passes": point.passes,
        "calibration_protocol": context.tokens("calibration").protocol.to_json(),
        "settings": settings,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"was-search": __version__, **{name: version(name) for name in ("torch", "transformers", "optuna")}},
    }


def _array(value: FloatArray | None) -> FloatArray:
    assert value is not None
    return value
