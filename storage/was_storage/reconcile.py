"""Repairs what a crash left between our slots, which are the truth, and Optuna's trials.

Two steps, each committed: first every slot with a vector gets its one trial, then the finished ones are
told. A trial is so never told before it is linked, and an unlinked one is always among the unfinished,
which are few to read.
"""

from __future__ import annotations

from typing import Any

from optuna.storages import BaseStorage
from sqlalchemy import Connection, Row

from was_search.slots import SlotState
from was_storage import slot_rows, trials


def link_trials(connection: Connection, storage: BaseStorage, study_id: int, optuna_study_id: int) -> int:
    """Link every slot that has a vector to a trial, made where there is none; returns the number of repairs.

    Trials that carry a slot's number but cannot be linked are told FAIL. Trials without one were put there
    by hand and are left alone.
    """
    repairs = 0
    rows: dict[int, Row[Any]] = {row.number: row for row in slot_rows.read_all(connection, study_id, proposed=True)}
    linked = {number: row.trial_id for number, row in rows.items() if row.trial_id is not None}
    for trial in trials.unfinished(storage, optuna_study_id):
        number = trial.user_attrs.get(trials.SLOT_ATTR)
        if not isinstance(number, int) or linked.get(number) == trial._trial_id:
            continue
        if number in rows and number not in linked:
            slot_rows.write(connection, study_id, number, trial_id=trial._trial_id)
            linked[number] = trial._trial_id
        else:
            trials.fail_surplus(storage, trial._trial_id, f"surplus trial of slot {number}")
        repairs += 1
    for number, row in rows.items():
        if number not in linked:
            trial_id = trials.create(storage, optuna_study_id, row)
            slot_rows.write(connection, study_id, number, trial_id=trial_id)
            repairs += 1
    return repairs


def tell_finished(connection: Connection, storage: BaseStorage, study_id: int, optuna_study_id: int) -> int:
    """Tell Optuna of the finished slots that it does not know of; returns how many. All must be linked."""
    unfinished = {trial._trial_id for trial in trials.unfinished(storage, optuna_study_id)}
    if not unfinished:
        return 0
    rows = slot_rows.read_all(connection, study_id, proposed=True)
    untold = [row for row in rows if SlotState(row.state).finished and row.trial_id in unfinished]
    return sum(trials.tell(storage, trials.slot_from_row(row), row.attrs or {}) for row in untold)
