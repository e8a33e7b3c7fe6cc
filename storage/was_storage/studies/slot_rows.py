"""Reads and writes rows of the slot table inside a caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, func, select, text, update

from was_search.errors import StudyError
from was_search.studies.slots import Slot, SlotState
from was_storage.server.schema import slot
from was_storage.studies.trials import slot_from_row

_LINK = text(
    "UPDATE was.slot AS s SET trial_id = r.id FROM unnest(CAST(:numbers AS integer[]), CAST(:ids AS integer[])) "
    "AS r(number, id) WHERE s.study_id = :study_id AND s.number = r.number"
)
_ARRAYS = ("levels", "sparsities", "losses")


def add_slots(connection: Connection, study_id: int, n_slots: int) -> int:
    """Add waiting slots until the study has ``n_slots``, never removing any; returns how many it has."""
    statement = text(
        "INSERT INTO was.slot (study_id, number) "
        "SELECT :study_id, n FROM generate_series(0, CAST(:last AS integer)) AS n ON CONFLICT DO NOTHING"
    )
    connection.execute(statement, {"study_id": study_id, "last": n_slots - 1})
    return int(connection.execute(select(func.count()).where(slot.c.study_id == study_id)).scalar_one())


def untouched_from(connection: Connection, study_id: int) -> int:
    """One more than the number of the last slot that has a vector or has left ``waiting``; 0 if there is none."""
    touched = (slot.c.state != str(SlotState.WAITING)) | slot.c.params.is_not(None) | slot.c.trial_id.is_not(None)
    query = select(func.coalesce(func.max(slot.c.number) + 1, 0)).where(slot.c.study_id == study_id, touched)
    return int(connection.execute(query).scalar_one())


def drop_slots(connection: Connection, study_id: int, n_slots: int) -> int:
    """Remove the slots from ``n_slots`` on that come after every touched one; returns how many are left.

    The caller's transaction must keep the coordinator from handing any of them out meanwhile.
    """
    kept = max(n_slots, untouched_from(connection, study_id))
    connection.execute(delete(slot).where(slot.c.study_id == study_id, slot.c.number >= kept))
    return int(connection.execute(select(func.count()).where(slot.c.study_id == study_id)).scalar_one())


def read_slots(
    connection: Connection, study_id: int, *, finished: bool = False, finished_since: datetime | None = None
) -> list[Slot]:
    """All slots by number, without what only storage needs; arrays travel in binary, ten times as fast as text.

    With ``finished`` only those that have finished, with ``finished_since`` those that did at that moment or later.
    """
    columns = [column for column in slot.c if column.name not in (*_ARRAYS, "distributions", "attrs")]
    arrays = [func.array_send(slot.c[name]).label(name) for name in _ARRAYS]
    query = select(*columns, *arrays).where(slot.c.study_id == study_id).order_by(slot.c.number)
    if finished:
        query = query.where(slot.c.state.in_([str(state) for state in SlotState if state.finished]))
    if finished_since is not None:
        query = query.where(slot.c.finished_at >= finished_since)
    return [slot_from_row(row) for row in connection.execute(query)]


def read(connection: Connection, study_id: int, number: int) -> Row[Any]:
    """The row of one slot.

    Raises:
        StudyError: the study has no such slot.
    """
    row = connection.execute(select(slot).where(_one(study_id, number))).one_or_none()
    if row is None:
        raise StudyError(f"the study has no slot {number}")
    return row


def read_without_trial(connection: Connection, study_id: int) -> Sequence[Row[Any]]:
    """The rows that have a vector and no trial, by number."""
    missing = (slot.c.study_id == study_id) & slot.c.params.is_not(None) & slot.c.trial_id.is_(None)
    return connection.execute(select(slot).where(missing).order_by(slot.c.number)).all()


def link_trials(connection: Connection, study_id: int, trial_ids: Mapping[int, int]) -> None:
    """Note each slot's trial; ``trial_ids`` are by slot's number."""
    given = {"study_id": study_id, "numbers": list(trial_ids), "ids": list(trial_ids.values())}
    connection.execute(_LINK, given)


def trial_ids(connection: Connection, study_id: int) -> dict[int, int | None]:
    """Optuna's id of the trial by slot's number, of the slots that have a vector."""
    query = select(slot.c.number, slot.c.trial_id).where(slot.c.study_id == study_id, slot.c.params.is_not(None))
    return {row.number: row.trial_id for row in connection.execute(query.order_by(slot.c.number))}


def read_finished(connection: Connection, study_id: int, trial_ids: Sequence[int]) -> Sequence[Row[Any]]:
    """The rows of those of ``trial_ids`` whose slots have finished, by number."""
    finished = [str(state) for state in SlotState if state.finished]
    query = select(slot).where(
        slot.c.study_id == study_id, slot.c.state.in_(finished), slot.c.trial_id == func.any(list(trial_ids))
    )
    return connection.execute(query.order_by(slot.c.number)).all()


def write(connection: Connection, study_id: int, number: int, **values: Any) -> None:
    """Set columns of one slot's row."""
    plain = {name: str(value) if isinstance(value, SlotState) else value for name, value in values.items()}
    connection.execute(update(slot).where(_one(study_id, number)).values(**plain))


def requeue_left_running(connection: Connection, study_id: int, epoch: int) -> int:
    """Put back the slots that a coordinator before ``epoch`` left running; returns how many."""
    left = (slot.c.study_id == study_id) & (slot.c.state == str(SlotState.RUNNING)) & (slot.c.epoch < epoch)
    values = {"state": str(SlotState.WAITING), "worker": "", "lease_expires_at": None}
    return connection.execute(update(slot).where(left).values(**values)).rowcount


def _one(study_id: int, number: int) -> ColumnElement[bool]:
    return (slot.c.study_id == study_id) & (slot.c.number == number)
