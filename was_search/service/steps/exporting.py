"""Step 4: the plan. The winner is re-calibrated at its own point, checked against the seed, and written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from was_search import __version__
from was_search.coordinator.model_calls import Norms
from was_search.errors import ConfigError, StorageError, StudyError
from was_search.plan import Plan, require_writable
from was_search.process import logs
from was_search.service.caching import array_row, cached
from was_search.service.context import Context
from was_search.service.reports.study_report import plan_gap_nats
from was_search.service.settings import OPTIONS, Settings
from was_search.service.steps.calibration import OperatingPoint
from was_search.service.steps.candidates import COMPENSATED, Figures, Request, measure
from was_search.service.steps.compensation import as_exported
from was_search.service.steps.decode_time import predictions
from was_search.service.steps.dense import Dense
from was_search.service.steps.pages import report_study
from was_search.service.steps.question import Question
from was_search.service.steps.study import SearchResult
from was_search.shape import FloatArray
from was_search.studies.names import folder_name
from was_search.studies.origin import Origin, OriginKind
from was_search.studies.slots import Slot
from was_search.texts.protocol import content_hash
from was_search.weight_format import AS_STORED

Layout = Literal["checkpoint", "columns"]
"""How weights lie beside a plan."""


@dataclass(frozen=True)
class Contender:
    """A slot that may be exported, with the name it has in tables."""

    name: str
    slot: Slot

    @property
    def sparsities(self) -> FloatArray:
        assert self.slot.sparsities is not None
        return self.slot.sparsities


def export(context: Context, result: SearchResult | None = None) -> Path:
    """Write the plan of the study's best vector, and what the dashboard shows of it; returns the plan's folder.

    Raises:
        StudyError: no such study, or none of its slots is complete.
        PlanError: the plan's folder cannot be written.
    """
    require_writable(plans_folder(context.settings))
    result = result or stored_result(context)
    result = dataclasses.replace(result, question=result.question.on(context))
    with logs.bound(study=result.study):
        folder = write_plan(context, result)
        report_study(context.database, result.study, result.seeds, result.question)
    return folder


def plans_folder(settings: Settings) -> Path:
    """Where plans are written, into it or below."""
    return Path(settings.plan or "was-runs")


def plan_folder(settings: Settings, study: str) -> Path:
    """Where the plan of ``study`` is written."""
    return plans_folder(settings) if settings.plan else plans_folder(settings) / folder_name(study) / "plan"


def add_weights(context: Context, folder: Path, layout: Layout = "checkpoint") -> Path:
    """Add to the plan in ``folder`` the model's weights and tokenizer; then it is all that decoding needs.

    As ``checkpoint`` they are the checkpoint's own files, whose configuration speaks of the plan: other programs load
    them too. As ``columns`` projections are laid out as decoding reads them, for the fastest start and least memory, in
    the checkpoint's dtype unless the settings name another.

    Raises:
        PlanError: the plan is of another model, or the folder cannot be written.
        ConfigError: the plan is for rounded weights.
    """
    from was_search.checkpoints.column_layout import save_columns
    from was_search.checkpoints.files import read_config
    from was_search.checkpoints.load import DTYPES, load_model
    from was_search.checkpoints.plan_checkpoint import save_with_plan

    plan = Plan.load(folder)
    plan.require_model(context.model.fingerprint, plan.shape)
    if plan.weights != AS_STORED:
        raise ConfigError(
            f"with_weights: {plan.weights} weights are laid out when they are rounded, at loading; leave it out"
        )
    if layout == "checkpoint":
        with context.reporter.phase("copy the checkpoint beside the plan"):
            return save_with_plan(context.model.source, plan, folder)
    config = read_config(context.model.source)
    stored, dtype = config.get("dtype", config.get("torch_dtype")), context.settings.dtype
    if dtype == "auto":
        dtype = stored if stored in DTYPES else "bfloat16"
    with context.reporter.phase(f"write weights for decoding, {dtype}"):
        return save_columns(load_model(context.model.source, dtype=dtype), plan, context.model.source, folder)


def write_plan(context: Context, result: SearchResult) -> Path:
    """Write the plan of the study's best vector and add it to the study's report; returns the plan's folder.

    The winner and the best seed are re-calibrated at their own points and compared by the study's fitness on the
    search split at equal achieved sparsity; the better one is exported, and the plan says which. Unless the settings
    say otherwise, a compensation is learned for it first, and its sparsities move along.

    Raises:
        StudyError: none of the study's slots is complete.
    """
    from was_storage.dashboard.plan_files import attach_plan
    from was_storage.studies.store import StudyStore

    best = result.best
    if best is None or best.sparsities is None:
        raise StudyError(
            f"study {result.study!r} has no complete trial yet; search first, or raise the limit that ended it"
        )
    question = result.question
    contenders = [Contender(f"best (slot {best.number})", best)]
    if best.source.kind is not OriginKind.SEED:
        contenders += [Contender("fisher seed", s) for s in result.slots if s.source == Origin.seed("fisher")]
    points = [question.dense.point(c.sparsities, c.name) for c in contenders]
    on_search = measure(
        question.dense,
        [Request(c.name, "search", p, by_fitness=True) for c, p in zip(contenders, points, strict=True)],
    )
    winner = least([figures.evaluation.loss_nats for figures in on_search])
    chosen, point, figures = contenders[winner], points[winner], on_search[winner]
    if winner:
        context.reporter.note(
            f"re-calibrated, the {chosen.name} is better on the search split than slot {best.number}: it is exported"
        )
    sparsities, point, learned = as_exported(question, chosen.sparsities, point, chosen.name)
    if learned:
        (figures,) = measure(question.dense, [Request(COMPENSATED, "search", point)])
    plan = make_plan(
        question,
        chosen.name,
        sparsities,
        point,
        figures,
        {
            "study": result.study,
            "slot": chosen.slot.number,
            "origin": chosen.slot.origin,
            "trial_loss_nats": chosen.slot.loss_nats,
            **learned,
        },
    )
    folder = plan.save(plan_folder(question.settings, result.study))
    name = f"{chosen.name}, with a compensation" if learned else chosen.name
    exported = {"slot": chosen.slot.number, "candidate": name, "achieved": plan.achieved}
    StudyStore(context.database).set_report(
        result.study,
        {
            "exported": {**exported, "best_slot": best.number},
            "metrics": plan.metrics,
            "gap_nats": plan_gap_nats(plan),
            **learned,
            **({"step": plan.provenance["step"]} if "step" in plan.provenance else {}),
        },
    )
    try:
        attach_plan(context.database, result.study, folder)
    except StorageError as error:
        context.reporter.note(f"the plan is not shown in optuna-dashboard: {error}")
    return folder


def least(losses: list[float]) -> int:
    """Index of the least loss; one that is no number never wins, unless none is."""
    return min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))


def make_plan(
    question: Question,
    name: str,
    sparsities: FloatArray,
    point: OperatingPoint,
    on_search: Figures,
    origin: dict[str, Any],
) -> Plan:
    """The plan of ``sparsities`` [L, 7] at its ``point``, with figures on both splits; ``origin`` says its source."""
    shape, tokens, model = question.shape, question.tokens, question.model
    test, dense_search, dense_test = measure(
        question.dense,
        [Request(name, "test", point), Request("dense", "search", None), Request("dense", "test", None)],
    )
    dense = {"search": dense_search.to_json(tokens), "test": dense_test.to_json(tokens)}
    return Plan(
        model=model.source.display_name,
        revision=model.source.revision,
        fingerprint=model.fingerprint,
        shape=shape,
        weights=question.settings.weights,
        score=question.settings.score,
        budget=question.budget.nominal(sparsities),
        dense_prefix=tokens.calibration.protocol.dense_prefix,
        prefill=question.settings.prefill,
        compensation=point.compensation,
        sparsities=sparsities,
        thresholds=point.thresholds,
        norms=_norms(question.dense),
        achieved={
            "calibration": shape.sparsity(point.achieved),
            "search": on_search.achieved,
            "test": test.achieved,
        },
        metrics={"search": on_search.to_json(tokens), "test": test.to_json(tokens), "dense": dense},
        provenance={
            **origin,
            **_provenance(question, point),
            **predictions(question.latency, sparsities, point),
        },
    )


def stored_result(context: Context) -> SearchResult:
    """The study of the settings as it stands in the database, without running anything of it."""
    from was_search.service.steps.seeding import seed
    from was_search.service.steps.study_identity import identity, require_name
    from was_storage.studies.store import StudyStore

    question = Question.of(context)
    mine = identity(question)
    name = require_name(context.database, question, mine)
    store = StudyStore(context.database)
    store.get(name)  # an unknown name is refused before anything is calibrated
    store.require_same(name, identity=mine, shape=question.shape.to_json())
    return SearchResult(name, store.slots(name), seed(context, question), question, drained=False)


def _norms(dense: Dense) -> tuple[tuple[Any, ...], ...]:
    context, shape = dense.context, dense.calibration.shape
    key = content_hash("norms", 1, context.model.key, context.settings.scoring, context.placement.dtype)
    width = sum(sum(row) for row in shape.in_features)

    def make() -> npt.NDArray[np.float32]:
        (rows,) = context.pool.map([Norms()])
        return np.concatenate([norm for row in rows for norm in row])

    flat = cached(array_row(context.cache, "norms", key, (width,), np.float32), make)
    ends = np.cumsum([width for row in shape.in_features for width in row])
    parts = iter(np.split(flat, ends[:-1]))
    return tuple(tuple(next(parts) for _ in row) for row in shape.in_features)


def _provenance(question: Question, point: OperatingPoint) -> dict[str, Any]:
    from importlib.metadata import version

    settings = {name: getattr(question.settings, name) for name, option in OPTIONS.items() if not option.secret}
    if settings["profile"]:
        settings["profile"] = str(Path(settings["profile"]).resolve())
    settings["model"], settings["revision"] = question.model.source.location, question.model.source.revision
    if Path(question.settings.data).exists():
        settings["data"] = str(Path(question.settings.data).resolve())
    return {
        "calibration_passes": point.passes,
        "calibration_protocol": question.tokens.calibration.protocol.to_json(),
        "settings": settings,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "was-search": __version__,
            **{name: version(name) for name in ("torch", "transformers", "optuna")},
        },
    }
