"""Makes Optuna's trials, which others may change, agree with our slots, which are the truth."""

from __future__ import annotations

from optuna.trial import TrialState
from sqlalchemy import Connection

from was_storage.studies import optuna_rows, slot_rows, trials


def repair(connection: Connection, study_id: int, optuna_study_id: int) -> int:
    """Give every slot that has a vector its one trial, and tell the finished ones; returns the number of repairs.

    Trials that carry a slot's number but are not that slot's are told FAIL. Trials without a number were put there by
    hand and are left alone.
    """
    surplus = _fail_surplus(connection, study_id, optuna_study_id)
    made = _make_missing(connection, study_id, optuna_study_id)
    return surplus + made + _tell_finished(connection, study_id, optuna_study_id)


def _fail_surplus(connection: Connection, study_id: int, optuna_study_id: int) -> int:
    linked = slot_rows.trial_ids(connection, study_id)
    surplus = [
        optuna_rows.EndedTrial(trial_id, TrialState.FAIL, None, {}, {"error": f"surplus trial of slot {number}"})
        for trial_id, number in optuna_rows.unfinished(connection, optuna_study_id, trials.SLOT_ATTR)
        if isinstance(number, int) and linked.get(number) != trial_id
    ]
    return optuna_rows.end(connection, surplus)


def _make_missing(connection: Connection, study_id: int, optuna_study_id: int) -> int:
    rows = slot_rows.read_without_trial(connection, study_id)
    made = optuna_rows.create(connection, optuna_study_id, [trials.new_trial(r.number, r._asdict()) for r in rows])
    slot_rows.link_trials(connection, study_id, {row.number: i for row, i in zip(rows, made, strict=True)})
    return len(made)


def _tell_finished(connection: Connection, study_id: int, optuna_study_id: int) -> int:
    unfinished = [trial_id for trial_id, _ in optuna_rows.unfinished(connection, optuna_study_id, trials.SLOT_ATTR)]
    untold = slot_rows.read_finished(connection, study_id, unfinished)
    ended = [trials.ended_trial(row.trial_id, trials.slot_from_row(row), row.attrs or {}) for row in untold]
    return optuna_rows.end(connection, ended)
