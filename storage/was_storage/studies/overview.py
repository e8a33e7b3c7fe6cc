"""Reads what status shows of a study, in one transaction and without the arrays of its slots."""

from __future__ import annotations

import dataclasses

from sqlalchemy import Connection, func, select

from was_search.studies.control import TOGETHER
from was_search.studies.overview import RunRecord, SlotLine, Snapshot
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.server.schema import run, slot, study
from was_storage.studies import control_rows
from was_storage.studies.coordinator_lock import held
from was_storage.studies.store import StudyStore

_STATES = {str(state): state for state in SlotState}
_RUN_COLUMNS = [run.c[field.name] for field in dataclasses.fields(RunRecord)]


def read_snapshot(database: Database, name: str) -> Snapshot:
    """The study as it stands; needs no coordinator's lock.

    Raises:
        StudyError: there is no such study.
        TransientError: the connection was lost.
    """
    study_id = StudyStore(database).id_of(name)
    with database.begin() as connection:
        row = connection.execute(select(study).where(study.c.id == study_id)).one()
        runs = connection.execute(select(*_RUN_COLUMNS).where(run.c.study_id == study_id).order_by(run.c.epoch))
        return Snapshot(
            name=name,
            identity=row.identity,
            config=row.config,
            report=row.report,
            control=control_rows.read(connection, study_id),
            slots=_lines(connection, study_id),
            runs=[RunRecord(**each._mapping) for each in runs],
            alive=held(connection, study_id),
            epoch=row.epoch,
            now=connection.execute(select(func.now())).scalar_one(),
            elsewhere=control_rows.spent(connection, set(row.config.get(TOGETHER, ())) - {name}),
        )


def _lines(connection: Connection, study_id: int) -> list[SlotLine]:
    columns = slot.c
    query = select(
        columns.number,
        columns.state,
        columns.origin,
        columns.loss_nats,
        columns.nll_nats,
        func.coalesce(func.cardinality(columns.losses), 0).label("sequences"),
        columns.seconds,
        columns.started_at,
        columns.finished_at,
        columns.error,
        columns.attrs["predicted_ms"].as_float(),
        columns.attrs["predicted_speedup"].as_float(),
    )
    rows = connection.execute(query.where(columns.study_id == study_id).order_by(columns.number))
    # In the order of SlotLine's fields: looking names up took longer than the query.
    return [SlotLine(number, _STATES[state], *rest) for number, state, *rest in rows]
