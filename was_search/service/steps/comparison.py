"""The table that compares the exported vector with its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from was_search.decode_time.profile import LatencyProfile
from was_search.masks.intervals import Interval, paired_interval
from was_search.plan import Plan
from was_search.service.reports.comparison import SEED_ROW
from was_search.service.reports.study_report import gap_nats, interval_json
from was_search.service.steps.calibration import OperatingPoint
from was_search.service.steps.candidates import COMPENSATED, Figures, Request, measure
from was_search.service.steps.study import SearchResult
from was_search.service.token_sets import TokenSets
from was_search.studies.origin import Origin, OriginKind

_ROW_NAMES = {"fisher": SEED_ROW, "warm": "warm seed"}


@dataclass(frozen=True)
class Row:
    """One method on the search and the test split, at its own operating point.

    Attributes:
        name: as tables show it.
        nominal: the parameter-weighted sparsity asked for.
        search: figures on the search split.
        test: figures on the test split.
        calibration_achieved: counted on the calibration split.
        gap_nats: the gap of :data:`was_search.service.reports.study_report.GAP_MEANING`.
        against_uniform: difference on the test split; None where there is nothing to compare.
        against_seed: difference to the Fisher seed on the test split, or None.
        step: the decoding step predicted at what was achieved on the test split; None where no profile is known.
    """

    name: str
    nominal: float
    search: Figures
    test: Figures
    calibration_achieved: float
    gap_nats: float
    against_uniform: Interval | None
    against_seed: Interval | None
    step: dict[str, float] | None = None

    def to_json(self, tokens: TokenSets) -> dict[str, Any]:
        return {
            "name": self.name,
            "nominal_sparsity": self.nominal,
            "achieved_on_calibration": self.calibration_achieved,
            "search": self.search.to_json(tokens),
            "test": self.test.to_json(tokens),
            "gap_nats": self.gap_nats,
            "test_against_uniform": interval_json(self.against_uniform),
            "test_against_fisher_seed": interval_json(self.against_seed),
            **({} if self.step is None else {"step": self.step}),
        }


def compare(found: SearchResult, plan: Plan) -> list[Row]:
    """Evaluate the dense model, the seeds and the exported plan on the search and test splits.

    Every vector has thresholds re-calibrated at its own point, so all achieve the same sparsity on the calibration
    split and are compared at it.
    """
    dense, shape = found.question.dense, found.question.shape
    vectors = {_ROW_NAMES.get(seed.name, seed.name): seed.sparsities for seed in found.seeds}
    is_seed = Origin.parse(plan.provenance["origin"]).kind is OriginKind.SEED
    exported = next(slot for slot in found.slots if slot.number == plan.provenance["slot"])
    assert exported.sparsities is not None
    vectors[f"best (slot {exported.number}{', seed' if is_seed else ''})"] = exported.sparsities
    points: dict[str, OperatingPoint | None] = {"dense": None}
    for name, sparsities in vectors.items():
        points[name] = dense.point(sparsities, name)
    if plan.compensation is not None:
        vectors[COMPENSATED] = plan.sparsities
        points[COMPENSATED] = dense.point(plan.sparsities, COMPENSATED, plan.compensation)
    requests = [Request(name, split, point) for name, point in points.items() for split in ("search", "test")]
    figures = measure(dense, requests)
    rows: list[Row] = []
    profile = found.question.latency
    by_name = {name: figures[2 * i : 2 * i + 2] for i, name in enumerate(points)}
    dense_search, dense_test = by_name["dense"]
    for name, point in points.items():
        on_search, on_test = by_name[name]
        rows.append(
            Row(
                name,
                0.0 if point is None else shape.sparsity(vectors[name]),
                on_search,
                on_test,
                0.0 if point is None else shape.sparsity(point.achieved),
                gap_nats(*(f.evaluation.loss_nats for f in (on_search, dense_search, on_test, dense_test))),
                None if name in ("dense", "uniform") else _interval(on_test, by_name["uniform"][1]),
                None if name in ("dense", SEED_ROW) else _interval(on_test, by_name[SEED_ROW][1]),
                None if profile is None else _step(profile, None if name == "dense" else on_test),
            )
        )
    return rows


def _step(profile: LatencyProfile, test: Figures | None) -> dict[str, float]:
    """The dense step for None, else the step predicted at the sparsities that were counted."""
    if test is None:
        return {"predicted_ms": 1e3 * profile.dense_seconds, "predicted_speedup": 1.0}
    return profile.figures(np.clip(test.evaluation.achieved, 0.0, 1.0))


def _interval(test: Figures, baseline: Figures) -> Interval | None:
    if len(test.evaluation.losses) < 2:
        return None
    return paired_interval(test.evaluation.losses, baseline.evaluation.losses)
