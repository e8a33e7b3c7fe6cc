"""Reads and writes rows of the control table inside a caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects.postgresql import insert

from was_search.errors import StudyError
from was_search.studies.control import OVERRIDABLE, Control, Overrides, Spent, Wish
from was_storage.server.schema import control, run, slot, study


def read(connection: Connection, study_id: int) -> Control:
    """What is asked of the study; one query that does not grow with the number of slots.

    Raises:
        StudyError: the study was deleted.
    """
    # Slots are numbered without gaps, and the highest number is one step into the primary key's index.
    highest = select(func.max(slot.c.number)).where(slot.c.study_id == study_id).scalar_subquery()
    query = select(control, highest.label("highest")).where(control.c.study_id == study_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise StudyError("the study was deleted")
    n_slots = 0 if row.highest is None else row.highest + 1
    return Control(Wish(row.wish), Overrides(**{name: getattr(row, name) for name in OVERRIDABLE}), n_slots)


def spent(connection: Connection, names: Collection[str]) -> Spent:
    """What all runs of the named studies have used up, as each has last written it down."""
    sums = select(func.sum(run.c.seconds), func.sum(run.c.gpu_seconds)).join(study, study.c.id == run.c.study_id)
    seconds, gpu_seconds = connection.execute(sums.where(study.c.name.in_(list(names)))).one()
    return Spent(seconds or 0.0, gpu_seconds or 0.0)


def write_wish(connection: Connection, study_id: int, wish: Wish) -> None:
    values = {"wish": str(wish), "wished_at": func.now()}
    connection.execute(update(control).where(control.c.study_id == study_id).values(**values))


def write_overrides(connection: Connection, study_id: int, values: Mapping[str, Any]) -> None:
    """Set the overrides that ``values`` names; None takes one back."""
    if values.get("workers") is not None:
        values = {**values, "workers": str(values["workers"])}
    if values:
        connection.execute(update(control).where(control.c.study_id == study_id).values(**values))


def settle_overrides(
    connection: Connection, study_id: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Overrides:
    """Take back the overrides of options that a run sets to another value than the run before it; returns the rest.

    Args:
        connection: in a transaction that holds the study's row.
        study_id: its id in our tables.
        before: the options of the run before.
        now: those of this run.
    """
    connection.execute(insert(control).values(study_id=study_id).on_conflict_do_nothing())
    changed = [name for name in OVERRIDABLE if before.get(name, now.get(name)) != now.get(name)]
    write_overrides(connection, study_id, dict.fromkeys(changed))
    return read(connection, study_id).overrides
