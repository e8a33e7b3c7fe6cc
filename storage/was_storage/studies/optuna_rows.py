"""Optuna's tables written directly: many trials in a few statements, inside a transaction of ours.

Through Optuna's API a trial of 32 parameters takes some 75 statements and a commit of its own beside ours. Here it
takes none of its own: slot and trial are committed together, so that a crash can leave neither without the other.
What is written is what the API writes; ``tests/storage/studies/test_batches.py`` reads both with Optuna's own reader.
The tables must be of the revision that :mod:`was_storage.server.optuna_tables` knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import check_distribution_compatibility, json_to_distribution
from optuna.trial import TrialState
from sqlalchemy import Connection, text

from was_search.errors import StudyError
from was_search.process.plain_json import dumps

# Optuna locks the same row while it numbers a trial.
_LOCK = text("SELECT study_id FROM studies WHERE study_id = :study_id FOR NO KEY UPDATE")
_COUNT = text("SELECT count(*) FROM trials WHERE study_id = :study_id")
_TRIALS = text(
    "INSERT INTO trials (number, study_id, state, datetime_start) "
    "SELECT n, :study_id, 'RUNNING', timezone('utc', clock_timestamp()) "
    "FROM generate_series(CAST(:first AS integer), :last) AS n ORDER BY n RETURNING number, trial_id"
)
_PARAMS = text(
    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) SELECT * FROM unnest("
    "CAST(:ids AS integer[]), CAST(:names AS text[]), CAST(:values AS double precision[]), CAST(:kinds AS text[]))"
)
_ATTRS = text(
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT * FROM unnest("
    "CAST(:ids AS integer[]), CAST(:keys AS text[]), CAST(:values AS text[])) "
    "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"
)
_OPEN = text(
    "SELECT trial_id FROM trials WHERE trial_id = ANY(:ids) AND state IN ('RUNNING', 'WAITING') "
    "ORDER BY trial_id FOR UPDATE"
)
_STEPS = text(
    "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type) "
    "SELECT i, s, v, 'FINITE' FROM unnest(CAST(:ids AS integer[]), CAST(:steps AS integer[]), "
    "CAST(:values AS double precision[])) AS r(i, s, v) ON CONFLICT (trial_id, step) DO UPDATE SET "
    "intermediate_value = excluded.intermediate_value, intermediate_value_type = excluded.intermediate_value_type"
)
_VALUES = text(
    "INSERT INTO trial_values (trial_id, objective, value, value_type) SELECT i, 0, v, 'FINITE' "
    "FROM unnest(CAST(:ids AS integer[]), CAST(:values AS double precision[])) AS r(i, v) "
    "ON CONFLICT (trial_id, objective) DO UPDATE SET value = excluded.value, value_type = excluded.value_type"
)
_STATES = text(
    "UPDATE trials AS t SET state = CAST(r.state AS trialstate), "
    "datetime_complete = timezone('utc', clock_timestamp()) "
    "FROM unnest(CAST(:ids AS integer[]), CAST(:states AS text[])) AS r(id, state) WHERE t.trial_id = r.id"
)
_KINDS = text(
    "SELECT n.name, (SELECT p.distribution_json FROM trials t JOIN trial_params p ON p.trial_id = t.trial_id "
    "WHERE t.study_id = :study_id AND p.param_name = n.name LIMIT 1) AS kind "
    "FROM unnest(CAST(:names AS text[])) AS n(name)"
)
_UNFINISHED = text(
    "SELECT t.trial_id, a.value_json FROM trials t LEFT JOIN trial_user_attributes a "
    "ON a.trial_id = t.trial_id AND a.key = :key "
    "WHERE t.study_id = :study_id AND t.state IN ('RUNNING', 'WAITING') ORDER BY t.trial_id"
)


@dataclass(frozen=True)
class NewTrial:
    """A RUNNING trial to be made.

    ``params`` are in the distributions' internal form, ``distributions`` Optuna's JSON, both by parameter name;
    ``attrs`` are plain JSON.
    """

    params: Mapping[str, float]
    distributions: Mapping[str, str]
    attrs: Mapping[str, Any]


@dataclass(frozen=True)
class EndedTrial:
    """How a trial ended; finite numbers only."""

    trial_id: int
    state: TrialState
    value: float | None
    steps: Mapping[int, float]
    attrs: Mapping[str, Any]


def kinds(connection: Connection, study_id: int, names: Sequence[str]) -> dict[str, str]:
    """One distribution of the Optuna study for each of ``names``; names that it does not have are left out."""
    rows = connection.execute(_KINDS, {"study_id": study_id, "names": list(names)})
    return {row.name: row.kind for row in rows if row.kind is not None}


def check_kind(known_as: str, asked: str) -> None:
    """Raise ValueError where Optuna refuses a distribution because the study has another of the same name."""
    check_distribution_compatibility(json_to_distribution(known_as), json_to_distribution(asked))


def create(connection: Connection, study_id: int, trials: Sequence[NewTrial]) -> list[int]:
    """Make RUNNING trials, in their order; returns their ids.

    Raises:
        StudyError: the Optuna study is gone.
    """
    if not trials:
        return []
    if connection.execute(_LOCK, {"study_id": study_id}).scalar() is None:
        raise StudyError("its Optuna study was deleted while it ran; start the search again, which makes it anew")
    first = int(connection.execute(_COUNT, {"study_id": study_id}).scalar_one())
    span = {"study_id": study_id, "first": first, "last": first + len(trials) - 1}
    by_number = {row.number: row.trial_id for row in connection.execute(_TRIALS, span)}
    ids = [by_number[first + i] for i in range(len(trials))]
    params = [
        (trial_id, name, float(value), trial.distributions[name])
        for trial_id, trial in zip(ids, trials, strict=True)
        for name, value in trial.params.items()
    ]
    if params:
        columns = zip(("ids", "names", "values", "kinds"), zip(*params, strict=True), strict=True)
        connection.execute(_PARAMS, {name: list(values) for name, values in columns})
    _set_attrs(connection, [(i, trial.attrs) for i, trial in zip(ids, trials, strict=True)])
    return ids


def end(connection: Connection, ended: Sequence[EndedTrial]) -> int:
    """Tell Optuna how trials ended, except those told before; returns how many were told."""
    if not ended:
        return 0
    unfinished = set(connection.execute(_OPEN, {"ids": [trial.trial_id for trial in ended]}).scalars())
    told = [trial for trial in ended if trial.trial_id in unfinished]
    if not told:
        return 0
    steps = [(trial.trial_id, step, value) for trial in told for step, value in trial.steps.items()]
    if steps:
        ids, numbers, values = zip(*steps, strict=True)
        connection.execute(_STEPS, {"ids": list(ids), "steps": list(numbers), "values": list(values)})
    valued = [(trial.trial_id, trial.value) for trial in told if trial.value is not None]
    if valued:
        ids, values = zip(*valued, strict=True)
        connection.execute(_VALUES, {"ids": list(ids), "values": list(values)})
    _set_attrs(connection, [(trial.trial_id, trial.attrs) for trial in told])
    states = {"ids": [trial.trial_id for trial in told], "states": [trial.state.name for trial in told]}
    connection.execute(_STATES, states)
    return len(told)


def unfinished(connection: Connection, study_id: int, attr: str) -> list[tuple[int, Any]]:
    """(trial id, its user attribute ``attr`` or None) of the trials not told yet, oldest first."""
    rows = connection.execute(_UNFINISHED, {"study_id": study_id, "key": attr})
    return [(row.trial_id, None if row.value_json is None else json.loads(row.value_json)) for row in rows]


def _set_attrs(connection: Connection, attrs: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    rows = [(trial_id, key, dumps(value)) for trial_id, items in attrs for key, value in items.items()]
    if rows:
        ids, keys, values = zip(*rows, strict=True)
        connection.execute(_ATTRS, {"ids": list(ids), "keys": list(keys), "values": list(values)})
