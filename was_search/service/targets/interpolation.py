"""A plan between two studies: their winners interpolated onto a target that was not searched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.errors import ConfigError, StudyError
from was_search.plan import require_writable
from was_search.service.context import Context
from was_search.service.reports.interpolation import show_interpolated
from was_search.service.steps.candidates import Request, measure
from was_search.service.steps.compensation import as_exported
from was_search.service.steps.exporting import make_plan, plan_folder, plans_folder
from was_search.service.steps.question import Question
from was_search.service.steps.study_identity import identity, study_name
from was_search.service.steps.warm_start import winner
from was_search.shape import FloatArray, ModelShape
from was_search.studies.slots import Slot
from was_search.texts.protocol import content_hash
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import HIGHEST_DESCENDED

if TYPE_CHECKING:
    from was_storage.server.database import Database
    from was_storage.studies.store import StudyRecord

IN_COMMON = ("model", "score", "masks", "fitness", "search data", "calibration data")
"""Entries of the identity that two studies must share so that a vector between theirs means something."""


@dataclass(frozen=True)
class Neighbour:
    """A study's winner."""

    study: str
    target: float
    slot: Slot

    @property
    def sparsities(self) -> FloatArray:
        assert self.slot.sparsities is not None
        return self.slot.sparsities

    def to_json(self) -> dict[str, Any]:
        return {"study": self.study, "target": self.target, "slot": self.slot.number}


def may_interpolate(context: Context, question: Question | None = None) -> bool:
    """Whether to interpolate: the target has no study, and two neighbours have.

    Raises:
        StudyError: another study has this target; it should not be passed over silently.
    """
    from was_storage.studies.store import StudyStore

    question = question or Question.of(context)
    settings = question.settings
    settings.require_one_target()
    if settings.study or settings.target_speedup:
        return False
    records = StudyStore(context.database).list()
    if study_name(question) in {record.name for record in records}:
        return False
    mine = _plain_identity(question)
    same = [
        f"{record.name} (other: {', '.join(k for k in {**record.identity, **mine} if _differs(record, mine, k))})"
        for record in _alike(context.database, question)
        if not _differs(record, mine, "target")
    ]
    if same:
        raise StudyError(
            f"study {study_name(question)!r} does not exist, but studies of this target made with other options do: "
            f"{'; '.join(same)}; give the same options, or --interpolate to pass them by"
        )
    return None not in _neighbours(context.database, question)


def interpolate(context: Context, question: Question | None = None) -> Path:
    """Write a plan between the winners of the nearest studies below and above the target; returns its folder.

    Per projection a straight line between the two, put exactly on the budget; thresholds are re-taken at the plan's
    own point, and it is evaluated on the search and test splits. Nothing is searched, and the plan says so; a
    compensation is learned for it as for a search's best.

    Raises:
        StudyError: there is no study on one of the two sides.
        PlanError: the plan's folder cannot be written.
    """
    question = question or Question.of(context)
    settings = question.settings
    settings.require_one_target()
    if settings.target_speedup:
        raise ConfigError("interpolate: only between budgets of sparsity; search a speed-up with 'was-search run'")
    require_writable(plans_folder(settings))
    target = settings.target
    below, above = _neighbours(context.database, question)
    if below is None or above is None:
        raise StudyError(_one_sided(target, below, above))
    sparsities = between(below, above, question.shape, target)
    name = f"interpolated at {100 * target:g} %"
    sparsities, point, learned = as_exported(question, sparsities, question.dense.point(sparsities, name), name)
    (on_search,) = measure(question.dense, [Request(name, "search", point)])
    share = (target - below.target) / (above.target - below.target)
    origin = {
        "study": f"between {below.study} and {above.study}",
        "slot": None,
        "origin": "interpolated",
        "searched": False,
        "interpolated": {"below": below.to_json(), "above": above.to_json(), "share_of_above": share},
        **learned,
    }
    plan = make_plan(question, name, sparsities, point, on_search, origin)
    digest = content_hash(below.to_json(), above.to_json(), sparsities)[:8]
    label = f"{question.model.label}-{round(100 * target, 2):g}-interpolated-{digest}"
    folder = plan.save(plan_folder(settings, label))
    protocols = [question.tokens.of(split).protocol.describe() for split in ("search", "test")]
    show_interpolated(context.reporter, plan, below, above, folder, protocols)
    return folder


def between(below: Neighbour, above: Neighbour, shape: ModelShape, target: float) -> FloatArray:
    """Sparsities [L, 7] on the straight line between two winners at ``target``, exactly on the budget."""
    share = (target - below.target) / (above.target - below.target)
    line: FloatArray = (1.0 - share) * below.sparsities + share * above.sparsities
    return SparsityBudget(shape, target).onto(line, HIGHEST_DESCENDED)


def _alike(database: Database, question: Question) -> list[StudyRecord]:
    from was_storage.studies.store import StudyStore

    mine = _plain_identity(question)
    return [
        record
        for record in StudyStore(database).list()
        if "target" in record.identity and not any(_differs(record, mine, key) for key in IN_COMMON)
    ]


def _differs(record: StudyRecord, mine: dict[str, Any], key: str) -> bool:
    return bool(record.identity.get(key) != mine.get(key))


def _plain_identity(question: Question) -> dict[str, Any]:
    from was_storage.server.plain import plain

    found: dict[str, Any] = plain(identity(question))
    return found


def _neighbours(database: Database, question: Question) -> tuple[Neighbour | None, Neighbour | None]:
    """The nearest studies with a complete trial below and above the target; of several at one target the best."""
    from was_storage.studies.store import StudyStore

    store = StudyStore(database)
    target = question.settings.target
    records = [record for record in _alike(database, question) if record.best_loss_nats is not None]
    records.sort(key=lambda r: (abs(_target(r) - target), r.best_loss_nats))
    found: list[Neighbour | None] = []
    for side in (-1, 1):
        nearest = next((r for r in records if side * (_target(r) - target) > 0), None)
        slot = None if nearest is None else winner(nearest, store.slots(nearest.name))
        found.append(None if nearest is None or slot is None else Neighbour(nearest.name, _target(nearest), slot))
    return found[0], found[1]


def _target(record: StudyRecord) -> float:
    return float(record.identity["target"])


def _one_sided(wanted: float, below: Neighbour | None, above: Neighbour | None) -> str:
    target = f"{100 * wanted:g} %"
    missing = " or ".join(side for side, found in (("below", below), ("above", above)) if found is None)
    there = below or above
    has = f"there is {there.study} at {100 * there.target:g} %" if there else "there is none of any target"
    return (
        f"interpolate: no study of this model, data and score {missing} {target} has a complete trial ({has}); "
        f"run 'was-search run' with a --target {missing} {target}, or search this one with "
        f"--target {wanted:g}"
    )
