"""The coordinator's session: slots handed out and finished; one coordinator at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, text

from tests.doubles.small_study import (
    DISTRIBUTIONS,
    assert_one_to_one,
    finish,
    hand_out,
    new_study,
    propose,
    terminate_connections,
    vector,
)
from was_search.errors import StudyError, TransientError
from was_search.studies.hand_outs import HandOut
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


@pytest.fixture
def session(database: Database) -> Iterator[CoordinatorSession]:
    with StudyStore(database).coordinate(new_study(database, 6).name) as opened:
        yield opened


def _trial(database: Database, session: CoordinatorSession, number: int) -> FrozenTrial:
    trial_id = session.slots()[number].trial_id
    assert trial_id is not None
    return database.optuna_storage().get_trial(trial_id)


def test_a_slots_life(database: Database, session: CoordinatorSession) -> None:
    assert hand_out(session, 2, "node1:gpu0", attrs={"ppl": np.float32(2), "why": float("nan")}) == 1
    assert session.slots()[2].state is SlotState.RUNNING
    trial = _trial(database, session, 2)
    assert trial.state == TrialState.RUNNING
    assert trial.distributions == DISTRIBUTIONS
    assert trial.user_attrs == {
        "slot": 2, "origin": "sampler:tpe", "levels": [0.498, 0.698], "ppl": 2.0, "why": None,
    }  # fmt: skip
    losses = np.array([2.0, 3.0, 4.0])
    assert finish(
        session, 2, 1, SlotState.COMPLETE, losses=losses, nll_nats=5.0, tokens=300, seconds=1.5, achieved=0.61,
        worker="node1:gpu0", attrs={"ppl": 20.1},
    )  # fmt: skip
    slot = session.slots()[2]
    assert (slot.state, slot.attempt, slot.loss_nats, slot.tokens) == (SlotState.COMPLETE, 1, 3.0, 300)
    assert slot.nll_nats == 5.0
    assert (slot.seconds, slot.achieved, slot.worker, slot.error) == (1.5, 0.61, "node1:gpu0", "")
    assert slot.losses is not None
    assert slot.levels is not None
    assert slot.sparsities is not None
    np.testing.assert_array_equal(slot.losses, losses)
    np.testing.assert_array_equal(slot.levels, vector(2)["levels"])
    np.testing.assert_array_equal(slot.sparsities, vector(2)["sparsities"])
    assert slot.started_at is not None
    assert slot.finished_at is not None
    assert slot.started_at <= slot.finished_at
    attrs = _trial(database, session, 2).user_attrs
    assert attrs["losses"] == {"n": 3, "not_finite": 0, "mean_nats": 3.0, "std_nats": 1.0}
    assert (attrs["achieved_sparsity"], attrs["stopped_early"], attrs["ppl"]) == (0.61, False, 20.1)
    assert (attrs["tokens"], attrs["seconds"], attrs["worker"], attrs["attempt"]) == (
        300,
        1.5,
        "node1:gpu0",
        1,
    )
    assert_one_to_one(database, session)


def test_stopped_and_failed_slots(database: Database, session: CoordinatorSession) -> None:
    for number in (0, 1, 2):
        hand_out(session, number)
    assert finish(session, 0, 1, SlotState.STOPPED, losses=[1.0, 2.0], loss_nats=1.5, worker="w")
    assert finish(session, 1, 1, SlotState.FAILED, error="CUDA\0 out of memory", worker="w")
    assert finish(session, 2, 1, SlotState.STOPPED, worker="w") is True  # stopped before its first batch
    assert _trial(database, session, 0).intermediate_values == {2: 1.5}
    assert _trial(database, session, 0).user_attrs["stopped_early"] is True
    assert _trial(database, session, 1).user_attrs["error"] == "CUDA out of memory"
    assert _trial(database, session, 2).state == TrialState.PRUNED
    with pytest.raises(StudyError, match="complete, stopped or failed, got running"):
        finish(session, 0, 1, SlotState.RUNNING)


@pytest.mark.parametrize(
    ("losses", "loss_nats", "words"),
    [
        ([1.0, float("nan")], None, "1 of 2 losses are not finite"),
        ([float("inf")], 1.0, "1 of 1 losses are not finite"),
        ([1.0], float("nan"), "the loss is nan"),
        (None, None, "no loss was reported"),
    ],
)
def test_a_loss_that_is_no_number_fails_the_slot(
    database: Database,
    session: CoordinatorSession,
    losses: list[float] | None,
    loss_nats: float | None,
    words: str,
) -> None:
    attempt = hand_out(session, 0)
    assert finish(session, 0, attempt, SlotState.COMPLETE, losses=losses, loss_nats=loss_nats, worker="w")
    slot = session.slots()[0]
    assert (slot.state, slot.error, slot.loss_nats) == (SlotState.FAILED, words, None)
    assert _trial(database, session, 0).user_attrs["error"] == words
    assert_one_to_one(database, session)
    assert _trial(database, session, 0).state == TrialState.FAIL


def test_a_result_counts_once(database: Database, session: CoordinatorSession) -> None:
    assert finish(session, 0, 0, SlotState.FAILED) is False  # not handed out yet
    hand_out(session, 0)
    assert session.requeue(0, "worker lost") is True
    assert session.slots()[0].error == "worker lost"
    assert session.requeue(0, "again") is False
    assert hand_out(session, 0, "v") == 2
    assert finish(session, 0, 1, SlotState.COMPLETE, losses=[9.0]) is False  # the lost worker's late answer
    assert finish(session, 0, 2, SlotState.COMPLETE, losses=[2.0], worker="v") is True
    assert finish(session, 0, 2, SlotState.COMPLETE, losses=[1.0]) is False
    assert session.requeue(0, "late") is False
    assert session.slots()[0].loss_nats == 2.0
    assert len(database.optuna_storage().get_all_trials(session.optuna_study_id)) == 1
    assert_one_to_one(database, session)


def test_what_cannot_be_handed_out_is_refused(session: CoordinatorSession) -> None:
    with pytest.raises(StudyError, match="no slot 99"):
        hand_out(session, 99)
    with pytest.raises(StudyError, match=r"slot 0: only a proposed, waiting slot .* it is without a vector"):
        session.begin([HandOut(0, "w")], 60)
    assert hand_out(session, 0) == hand_out(session, 0) == 1  # repeated after a lost answer
    with pytest.raises(StudyError, match=r"slot 0: only a proposed, waiting slot .* it is running"):
        hand_out(session, 0, "v")
    finish(session, 0, 1, SlotState.FAILED)
    with pytest.raises(StudyError, match=r"slot 0: only a proposed, waiting slot .* it is failed"):
        hand_out(session, 0)


def test_a_vector_never_changes(session: CoordinatorSession) -> None:
    propose(session, 0)
    first = session.slots()[0]
    with pytest.raises(StudyError, match="slot 0 has another vector already"):
        hand_out(session, 0, **vector(1))
    hand_out(session, 0)
    again = session.slots()[0]
    assert (again.trial_id, again.params) == (first.trial_id, first.params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": {"level_0": 2.0, "level_1": 0.5}}, "'level_0' isn't contained"),
        ({"params": {"level_0": 0.5}}, "Inconsistent parameters"),
        ({"params": {"level_0": float("nan"), "level_1": 0.5}}, "slot 0"),
        ({"levels": [0.5]}, r"1 levels need shape \[1, 7\], got \(2, 7\)"),
        ({"levels": [0.5, float("nan")]}, "levels: must be finite numbers"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    session: CoordinatorSession, change: dict[str, object], words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        hand_out(session, 0, **change)
    assert session.slots()[0].params is None
    assert hand_out(session, 0) == 1


def test_a_parameter_of_another_kind_is_refused_and_the_slot_stays_free(session: CoordinatorSession) -> None:
    hand_out(session, 0)
    odd = {"params": {"level_0": 0.5}, "distributions": {"level_0": CategoricalDistribution((0.5,))}}
    with pytest.raises(StudyError, match="slot 1: Cannot set different distribution kind"):
        hand_out(session, 1, **odd)
    assert session.slots()[1].params is None
    assert hand_out(session, 1) == 1
    assert session.slots()[1].trial_id is not None


def test_a_second_coordinator_is_refused(database: Database, session: CoordinatorSession) -> None:
    other = StudyStore(database).coordinate(session.name)
    with pytest.raises(
        StudyError, match=r"another coordinator is running it \(was-search coordinator .* since .*wait for it"
    ):
        other.__enter__()
    hand_out(session, 0)  # the first is not disturbed
    session.close()
    with pytest.raises(StudyError, match="session is closed"):
        hand_out(session, 1)
    with other:
        assert other.epoch == session.epoch + 1


def test_a_replaced_coordinator_writes_nothing_more(database: Database, session: CoordinatorSession) -> None:
    propose(session, 1)
    attempt = hand_out(session, 0)
    terminate_connections(database)
    with StudyStore(database).coordinate(session.name) as newer:
        assert newer.slots()[0].state is SlotState.WAITING  # requeued, attempt kept
        assert newer.slots()[0].attempt == attempt
        with pytest.raises(StudyError, match="another coordinator is running it"):
            finish(session, 0, attempt, SlotState.COMPLETE, losses=[1.0])
        with pytest.raises(StudyError, match="another coordinator is running it"):
            hand_out(session, 2)
        finish(newer, 0, hand_out(newer, 0, "v"), SlotState.COMPLETE, losses=[2.0], worker="v")
    for write in (
        lambda: finish(session, 1, 1, SlotState.FAILED),
        lambda: session.begin([HandOut(1, "w")], 60),
        lambda: session.requeue(1, ""),
        lambda: hand_out(session, 2),
        lambda: session.shrink(3),
        session.reconcile,
    ):
        with pytest.raises(StudyError, match="another coordinator has taken over"):
            write()
    assert_one_to_one(database, session)


def test_the_epoch_alone_refuses_too(database: Database, session: CoordinatorSession) -> None:
    propose(session, 0)
    with database.begin() as connection:
        connection.execute(text("UPDATE was.study SET epoch = epoch + 1 WHERE name = :n"), {"n": session.name})
    with pytest.raises(StudyError, match=r"taken over \(epoch 2, ours was 1\)"):
        hand_out(session, 0)


def test_a_coordinator_that_was_not_replaced_goes_on(database: Database, session: CoordinatorSession) -> None:
    propose(session, 0)
    terminate_connections(database)
    assert hand_out(session, 0) == 2
    with pytest.raises(StudyError, match="another coordinator is running it"):  # it has its lock again
        StudyStore(database).coordinate(session.name).__enter__()


@contextmanager
def restart_before(database: Database, statement: str) -> Iterator[None]:
    """All connections end once, before a statement that begins so."""
    left = [statement]

    def strike(connection: Any, cursor: Any, sql: str, *_: Any) -> None:
        if left and sql.startswith(left[0]):
            left.clear()
            terminate_connections(database)

    event.listen(database.engine, "before_cursor_execute", strike)
    try:
        yield
    finally:
        event.remove(database.engine, "before_cursor_execute", strike)
    assert not left, f"nothing began with {statement!r}"


def test_a_restart_during_a_write_is_transient_and_repeating_mends_it(
    database: Database, session: CoordinatorSession
) -> None:
    for statement in ("INSERT INTO trials ", "UPDATE was.slot "):
        with restart_before(database, statement), pytest.raises(TransientError, match="connection was lost"):
            hand_out(session, 0)
    attempt = hand_out(session, 0)
    assert attempt == 1
    for statement in ("UPDATE was.slot ", "UPDATE trials "):
        with restart_before(database, statement), pytest.raises(TransientError, match="connection was lost"):
            finish(session, 0, attempt, SlotState.COMPLETE, losses=[1.0], worker="w")
    assert finish(session, 0, attempt, SlotState.COMPLETE, losses=[1.0], worker="w") is True
    assert len(database.optuna_storage().get_all_trials(session.optuna_study_id)) == 1
    assert_one_to_one(database, session)


def test_a_study_deleted_meanwhile(database: Database) -> None:
    store = StudyStore(database)
    session = store.coordinate(new_study(database).name)
    store.delete(session.name)
    with pytest.raises(StudyError, match="was deleted"):
        session.__enter__()
