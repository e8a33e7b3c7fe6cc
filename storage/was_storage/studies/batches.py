"""Several slots handed out, or finished, in one transaction together with their Optuna trials."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from was_search.errors import StudyError
from was_search.process.plain_json import dumps
from was_search.studies.hand_outs import HandOut
from was_search.studies.slots import Slot, SlotState
from was_storage.studies import optuna_rows, trials
from was_storage.studies.proposal import vector_columns

_READ = text(
    "SELECT number, state, attempt, epoch, worker, trial_id, params, distributions, attrs, levels, origin "
    "FROM was.slot WHERE study_id = :study_id AND number = ANY(:numbers) ORDER BY number FOR NO KEY UPDATE"
)
# A key that a row lacks is NULL and leaves its column as it is.
_BEGIN = text(
    "UPDATE was.slot AS s SET state = 'running', attempt = s.attempt + 1, epoch = :epoch, worker = r.worker, "
    "lease_expires_at = now() + make_interval(secs => :lease), started_at = now(), error = '', "
    "origin = coalesce(r.origin, s.origin), params = coalesce(r.params, s.params), "
    "distributions = coalesce(r.distributions, s.distributions), attrs = coalesce(r.attrs, s.attrs), "
    "levels = coalesce(r.levels, s.levels), sparsities = coalesce(r.sparsities, s.sparsities), "
    "trial_id = coalesce(r.trial_id, s.trial_id) "
    "FROM json_to_recordset(CAST(:rows AS json)) AS r(number integer, worker text, origin text, params jsonb, "
    "distributions jsonb, attrs jsonb, levels double precision[], sparsities double precision[], trial_id integer) "
    "WHERE s.study_id = :study_id AND s.number = r.number RETURNING s.number, s.attempt, s.trial_id"
)
_FINISH = text(
    "UPDATE was.slot AS s SET state = r.state, losses = r.losses, loss_nats = r.loss_nats, nll_nats = r.nll_nats, "
    "tokens = r.tokens, seconds = r.seconds, achieved = r.achieved, worker = r.worker, error = r.error, "
    "attrs = coalesce(s.attrs, '{}') || r.attrs, lease_expires_at = NULL, finished_at = now() "
    "FROM json_to_recordset(CAST(:rows AS json)) AS r(number integer, attempt integer, state text, "
    "losses double precision[], loss_nats double precision, nll_nats double precision, tokens bigint, "
    "seconds double precision, achieved double precision, worker text, error text, attrs jsonb) "
    "WHERE s.study_id = :study_id AND s.number = r.number AND s.attempt = r.attempt AND s.state = 'running' "
    "RETURNING s.number, s.attempt, s.trial_id"
)


class KnownKinds:
    """Kinds of the Optuna study's parameters, each read once: Optuna refuses two kinds under one name."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}

    def check(
        self, connection: Connection, optuna_study_id: int, asked: Sequence[tuple[int, Mapping[str, str]]]
    ) -> None:
        """Refuse parameters of another kind; ``asked`` are slots' numbers and distributions, Optuna's JSON by name.

        Raises:
            StudyError: the study, or another slot in ``asked``, has another kind of parameter of the same name.
        """
        new = sorted({name for _, kinds in asked for name in kinds} - self._kinds.keys())
        if new:
            self._kinds.update(optuna_rows.kinds(connection, optuna_study_id, new))
        seen = dict(self._kinds)
        for number, kinds in asked:
            for name, kind in kinds.items():
                known = seen.setdefault(name, kind)
                if known != kind:
                    try:
                        optuna_rows.check_kind(known, kind)
                    except ValueError as error:
                        raise StudyError(f"slot {number}: {error}") from error


def begin(
    connection: Connection,
    study_id: int,
    optuna_study_id: int,
    epoch: int,
    hand_outs: Sequence[HandOut],
    lease_seconds: float,
    kinds: KnownKinds,
    trial_ids: dict[int, int],
) -> list[int]:
    """Hand slots out, with vectors and trials where there are none yet; returns the attempts, in order.

    Repeated after a commit whose answer was lost, it changes nothing and returns the same. Optuna's ids of the slots'
    trials go into ``trial_ids``.

    Raises:
        StudyError: see :meth:`was_storage.studies.session.CoordinatorSession.begin`.
    """
    numbers = [hand_out.number for hand_out in hand_outs]
    found = {row.number: row for row in connection.execute(_READ, {"study_id": study_id, "numbers": numbers})}
    attempts: dict[int, int] = {}
    rows: list[dict[str, Any]] = []
    new: list[tuple[dict[str, Any], optuna_rows.NewTrial]] = []
    for hand_out in hand_outs:
        row = found.get(hand_out.number)
        if row is None:
            raise StudyError(f"the study has no slot {hand_out.number}")
        vector = None if hand_out.proposal is None else vector_columns(hand_out.number, hand_out.proposal)
        if vector is not None and row.params is not None and not _same(row, vector):
            raise StudyError(f"slot {row.number} has another vector already; it never changes")
        if row.state == SlotState.RUNNING and row.epoch == epoch and row.worker == hand_out.worker:
            attempts[row.number] = row.attempt
            trial_ids[row.number] = row.trial_id
            continue
        if row.state != SlotState.WAITING or (vector is None and row.params is None):
            state = row.state if row.state != SlotState.WAITING else "without a vector"
            raise StudyError(f"slot {row.number}: only a proposed, waiting slot can be started, it is {state}")
        values: dict[str, Any] = {"number": row.number, "worker": hand_out.worker}
        if row.params is None:
            assert vector is not None
            values |= vector
        if row.trial_id is None:
            new.append((values, trials.new_trial(row.number, row._asdict() | values)))
        rows.append(values)
    kinds.check(connection, optuna_study_id, [(values["number"], trial.distributions) for values, trial in new])
    made = optuna_rows.create(connection, optuna_study_id, [trial for _, trial in new])
    for (values, _), trial_id in zip(new, made, strict=True):
        values["trial_id"] = trial_id
    if rows:
        given = {
            "study_id": study_id,
            "epoch": epoch,
            "lease": float(lease_seconds),
            "rows": dumps(rows, ensure_ascii=False),
        }
        for row in connection.execute(_BEGIN, given):
            attempts[row.number] = row.attempt
            trial_ids[row.number] = row.trial_id
    return [attempts[number] for number in numbers]


def finish(
    connection: Connection, study_id: int, results: Sequence[tuple[Slot, dict[str, Any]]], unsure: Collection[int]
) -> list[bool]:
    """Write results with further attributes of their trials, and tell the trials: the session's ``finish_all``.

    Args:
        results: checked and storable; ``attempt`` is the one that ended.
        unsure: slots whose result may have been committed by an earlier call of the same.

    Returns:
        For each result, whether it is its slot's; of two of one attempt, the first.
    """
    first = {(slot.number, slot.attempt): slot for slot, _ in reversed(results)}
    firsts = [(slot, attrs) for slot, attrs in results if first[slot.number, slot.attempt] is slot]
    rows = [_result_row(slot, attrs) for slot, attrs in firsts]
    given = {"study_id": study_id, "rows": dumps(rows, ensure_ascii=False)}
    trial_ids = {(row.number, row.attempt): row.trial_id for row in connection.execute(_FINISH, given)}
    written = [(slot, attrs) for slot, attrs in firsts if (slot.number, slot.attempt) in trial_ids]
    optuna_rows.end(
        connection, [trials.ended_trial(trial_ids[slot.number, slot.attempt], slot, attrs) for slot, attrs in written]
    )
    late = [slot.number for slot, _ in firsts if (slot.number, slot.attempt) not in trial_ids and slot.number in unsure]
    before: dict[int, Row[Any]] = {}
    if late:
        before = {row.number: row for row in connection.execute(_READ, {"study_id": study_id, "numbers": late})}
    return [
        slot is first[key := (slot.number, slot.attempt)]
        and (key in trial_ids or _is_finished(before.get(slot.number), slot.attempt))
        for slot, _ in results
    ]


def _same(row: Row[Any], vector: dict[str, Any]) -> bool:
    return bool(row.params == vector["params"] and row.levels == vector["levels"])


def _is_finished(row: Row[Any] | None, attempt: int) -> bool:
    return row is not None and SlotState(row.state).finished and bool(row.attempt == attempt)


def _result_row(slot: Slot, attrs: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": slot.number,
        "attempt": slot.attempt,
        "state": str(slot.state),
        "loss_nats": slot.loss_nats,
        "nll_nats": slot.nll_nats,
        "tokens": slot.tokens,
        "seconds": slot.seconds,
        "achieved": slot.achieved,
        "worker": slot.worker,
        "error": slot.error,
        "attrs": attrs,
    }
    if slot.losses is not None:
        row["losses"] = [_number(loss) for loss in slot.losses.tolist()]
    return {name: _number(value) if isinstance(value, float) else value for name, value in row.items()}


def _number(value: float) -> float | str:
    """A number for JSON; NaN and infinities, which JSON lacks, as text that Postgres reads."""
    return value if math.isfinite(value) else str(value)
