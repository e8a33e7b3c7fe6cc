"""A small study for the tests of studies and sessions."""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState
from sqlalchemy import text

from was_search.coordinator.contracts import SlotStore
from was_search.shape import ModelShape
from was_search.studies.hand_outs import HandOut, Proposal, Result
from was_search.studies.slots import Slot, SlotState
from was_storage.server.database import Database
from was_storage.studies.cache import Artifact
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyRecord, StudyStore

SHAPE = ModelShape(((4,) * 7,) * 2, ((4,) * 7,) * 2)
IDENTITY = {"model": "tiny", "budget": 0.6}
DISTRIBUTIONS: dict[str, BaseDistribution] = {f"level_{b}": FloatDistribution(0, 1) for b in (0, 1)}
TOLD = {
    SlotState.WAITING: TrialState.RUNNING,
    SlotState.RUNNING: TrialState.RUNNING,
    SlotState.COMPLETE: TrialState.COMPLETE,
    SlotState.STOPPED: TrialState.PRUNED,
    SlotState.FAILED: TrialState.FAIL,
}


def new_study(database: Database, n_slots: int = 4, name: str | None = None) -> StudyRecord:
    return StudyStore(database).open_or_create(
        name or f"study {uuid.uuid4().hex[:8]}",
        identity=IDENTITY,
        config={"workers": 1},
        shape=SHAPE.to_json(),
        n_slots=n_slots,
    )


def whole(found: Artifact) -> Artifact:
    """Reads a cached row as it is."""
    return found


def vector(number: int) -> dict[str, Any]:
    levels = np.array([0.5, 0.7]) - number / 1000
    return {
        "origin": "sampler:tpe",
        "params": {"level_0": float(levels[0]), "level_1": float(levels[1])},
        "distributions": DISTRIBUTIONS,
        "levels": levels,
        "sparsities": np.repeat(levels[:, None], 7, axis=1),
    }


def hand_out(session: SlotStore, number: int, worker: str = "w", **changes: Any) -> int:
    """Give a slot its vector, with ``changes``, and hand it to ``worker``; returns the attempt."""
    proposal = Proposal(**{**vector(number), **changes})
    return session.begin([HandOut(number, worker, proposal)], 60)[0]


def propose(session: CoordinatorSession, number: int, **changes: Any) -> None:
    """Leave a slot waiting with a vector, as one whose worker was lost."""
    hand_out(session, number, **changes)
    assert session.requeue(number, "")


def finish(session: SlotStore, number: int, attempt: int, state: SlotState, **result: Any) -> bool:
    """Whether it became the slot's result."""
    return session.finish_all([Result(number, attempt, state, **result)])[0]


def assert_one_to_one(database: Database, session: CoordinatorSession, surplus: int = 0) -> None:
    """Every slot with a vector has one trial that says the same; ``surplus`` failed ones have no slot."""
    trials = {t._trial_id: t for t in database.optuna_storage().get_all_trials(session.optuna_study_id)}
    slots = [slot for slot in session.slots() if slot.params is not None]
    assert len({slot.trial_id for slot in slots}) == len(slots)
    for slot in slots:
        assert slot.trial_id is not None
        trial = trials.pop(slot.trial_id)
        assert trial.user_attrs["slot"] == slot.number
        assert trial.params == slot.params
        assert trial.state == TOLD[slot.state]
        _assert_result(slot, trial)
    assert len(trials) == surplus
    assert all(trial.state == TrialState.FAIL for trial in trials.values())


def terminate_connections(database: Database) -> None:
    """Ends all connections but one, as a restart of the database or the end of the processes does.

    A coordinator's pulse may open its next one before this returns: that one stays, and is not waited for.
    """
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        ended = list(connection.execute(text(f"SELECT pid, pg_terminate_backend(pid) {others}")).scalars())
        left = text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:ended)")
        while connection.execute(left, {"ended": ended}).scalar():
            time.sleep(0.005)


def _assert_result(slot: Slot, trial: Any) -> None:
    if slot.state is SlotState.COMPLETE:
        assert trial.value == slot.loss_nats
    else:
        assert trial.values is None
    if slot.state is SlotState.STOPPED:
        assert slot.losses is not None
        assert trial.intermediate_values == {len(slot.losses): slot.loss_nats}
    if slot.state.finished:
        assert trial.user_attrs["attempt"] == slot.attempt
        assert trial.user_attrs["worker"] == slot.worker
