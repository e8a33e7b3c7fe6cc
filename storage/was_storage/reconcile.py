"""Repairs what a crash left between our slots, which are the truth, and Optuna's trials.

Two steps, each committed: first every slot with a vector gets its one trial, then the finished ones are
told. A trial is so never told before it is linked, and an unlinked one is always among the unfinished,
which are few to read.
"""

from __future__ import annotations

from typing import Any

from optuna.storages import BaseStorage
from sqlalchemy import Connection

from was_storage import optuna_rows, slot_rows, trials


def link_trials(connection: Connection, storage: BaseStorage, study_id: int, optuna_study_id: int) -> int:
    """Link every slot that has a vector to a trial, made where there is none; returns the number of repairs.

    Trials that carry a slot's number but cannot be linked are told FAIL. Trials without one were put there
    by hand and are left alone.
    """
    repairs = 0
    linked = slot_rows.trial_ids(connection, study_id)
    for trial_id, number in _unfinished(connection, storage, optuna_study_id):
        if not isinstance(number, int) or linked.get(number) == trial_id:
            continue
        if number in linked and linked[number] is None:
            slot_rows.write(connection, study_id, number, trial_id=trial_id)
            linked[number] = trial_id
        else:
            trials.fail_surplus(storage, trial_id, f"surplus trial of slot {number}")
        repairs += 1
    missing = [number for number, trial_id in linked.items() if trial_id is None]
    for number in missing:
        made = trials.create(storage, optuna_study_id, slot_rows.read(connection, study_id, number))
        slot_rows.write(connection, study_id, number, trial_id=made)
    return repairs + len(missing)


def tell_finished(connection: Connection, storage: BaseStorage, study_id: int, optuna_study_id: int) -> int:
    """Tell Optuna of the finished slots that it does not know of; returns how many. All must be linked."""
    unfinished = [trial_id for trial_id, _ in _unfinished(connection, storage, optuna_study_id)]
    untold = slot_rows.read_finished(connection, study_id, unfinished)
    return sum(trials.tell(storage, trials.slot_from_row(row), row.attrs or {}) for row in untold)


def _unfinished(connection: Connection, storage: BaseStorage, optuna_study_id: int) -> list[tuple[int, Any]]:
    """(trial id, its slot's number if it has one) of the trials not told yet, oldest first."""
    if optuna_rows.known(connection):
        return optuna_rows.unfinished(connection, optuna_study_id, trials.SLOT_ATTR)
    found = trials.unfinished(storage, optuna_study_id)
    return [(trial._trial_id, trial.user_attrs.get(trials.SLOT_ATTR)) for trial in found]
