"""The winner of an earlier study, as a seed of another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from was_search.errors import StudyError
from was_search.service.context import Context
from was_search.service.steps.budgets import budget_of
from was_search.service.steps.question import Question
from was_search.service.steps.study_identity import study_name
from was_search.shape import ModelShape
from was_search.studies.origin import Origin
from was_search.studies.slots import Slot, best_slot
from was_search.vectors.seeds import Seed, point_seed, retarget

if TYPE_CHECKING:
    from was_storage.server.database import Database
    from was_storage.studies.store import StudyRecord

WARM = "warm"
"""Name of the seed that an earlier study gives."""


def warm_seeds(context: Context, question: Question) -> list[Seed]:
    """The winner of the settings' ``warm_start`` moved onto the budget, as a list of one seed; [] if none is set.

    Needs no calibration, so that a wrong name is refused at once. The context's database is opened only if one is set.

    Raises:
        StudyError: the earlier study does not exist, is this one, has no complete trial, or is of another model or
            score.
    """
    if not question.settings.warm_start:
        return []
    study = study_name(question)
    return [_warm_seed(context.database, question, study)]


def _warm_seed(database: Database, question: Question, study: str) -> Seed:
    from was_storage.studies.store import StudyStore

    settings = question.settings
    store = StudyStore(database)
    if settings.warm_start == study:
        raise StudyError(f"warm_start: study {study!r} cannot start from itself; choose another --study")
    own = next((record for record in store.list() if record.name == study), None)
    if own is not None:
        # The earlier study may have got better since, and a study's seeds never change.
        for slot in store.slots(study):
            if slot.source == Origin.seed(WARM) and slot.sparsities is not None:
                return point_seed(WARM, slot.sparsities, ModelShape.from_json(own.shape))
    record = store.get(settings.warm_start)
    _require_same(record, "model", question.model.fingerprint)
    _require_same(record, "score", settings.score)
    found = winner(record, store.slots(record.name))
    if found is None or found.sparsities is None:
        raise StudyError(f"warm_start: study {record.name!r} has no complete trial yet; run it first")
    shape = ModelShape.from_json(record.shape).with_masks(settings.masks)
    return point_seed(WARM, retarget(found.sparsities, budget_of(settings, shape, question.latency)), shape)


def winner(record: StudyRecord, slots: list[Slot]) -> Slot | None:
    """The slot that was exported, else the best one; None if none is complete.

    What is exported may be a seed that came out ahead once both were re-calibrated. It is the winner for as long as
    the best slot is the one that it was compared with.
    """
    best = best_slot(slots)
    exported = record.report.get("exported", {})
    if best is not None and exported.get("best_slot") == best.number:
        return next((slot for slot in slots if slot.number == exported["slot"]), best)
    return best


def _require_same(record: StudyRecord, key: str, wanted: str) -> None:
    has = record.identity.get(key)
    if has != wanted:
        raise StudyError(f"warm_start: study {record.name!r} is of another {key}: study has {has}, asked for {wanted}")
