"""The coordinator's session: propose, start, finish; one coordinator at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from tests.storage.small_study import (
    DISTRIBUTIONS,
    assert_one_to_one,
    new_study,
    terminate_connections,
    vector,
)
from was_search.errors import StudyError, TransientError
from was_search.slots import SlotState
from was_storage.database import Database
from was_storage.session import CoordinatorSession
from was_storage.studies import StudyStore

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
    proposed = session.propose(2, **vector(2), attrs={"ppl": np.float32(2), "why": float("nan")})
    assert proposed.state is SlotState.WAITING
    trial = _trial(database, session, 2)
    assert trial.state == TrialState.RUNNING
    assert trial.distributions == DISTRIBUTIONS
    assert trial.user_attrs == {
        "slot": 2, "origin": "sampler:tpe", "levels": [0.498, 0.698], "ppl": 2.0, "why": None,
    }  # fmt: skip
    assert session.start(2, "node1:gpu0", 60) == 1
    assert session.slots()[2].state is SlotState.RUNNING
    losses = np.array([2.0, 3.0, 4.0])
    assert session.finish(
        2, 1, SlotState.COMPLETE, losses=losses, nll_nats=5.0, tokens=300, seconds=1.5, achieved=0.61,
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
        session.propose(number, **vector(number))
        session.start(number, "w", 60)
    assert session.finish(0, 1, SlotState.STOPPED, losses=[1.0, 2.0], loss_nats=1.5, worker="w")
    assert session.finish(1, 1, SlotState.FAILED, error="CUDA\0 out of memory", worker="w")
    assert session.finish(2, 1, SlotState.STOPPED, worker="w") is True  # stopped before its first batch
    assert _trial(database, session, 0).intermediate_values == {2: 1.5}
    assert _trial(database, session, 0).user_attrs["stopped_early"] is True
    assert _trial(database, session, 1).user_attrs["error"] == "CUDA out of memory"
    assert _trial(database, session, 2).state == TrialState.PRUNED
    with pytest.raises(StudyError, match="complete, stopped or failed, got running"):
        session.finish(0, 1, SlotState.RUNNING)


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
    session.propose(0, **vector(0))
    attempt = session.start(0, "w", 60)
    assert session.finish(0, attempt, SlotState.COMPLETE, losses=losses, loss_nats=loss_nats, worker="w")
    slot = session.slots()[0]
    assert (slot.state, slot.error, slot.loss_nats) == (SlotState.FAILED, words, None)
    assert _trial(database, session, 0).user_attrs["error"] == words
    assert_one_to_one(database, session)
    assert session.finished_trials()[0].state == TrialState.FAIL


def test_a_result_counts_once(database: Database, session: CoordinatorSession) -> None:
    session.propose(0, **vector(0))
    assert session.finish(0, 0, SlotState.FAILED) is False  # not handed out yet
    session.start(0, "w", 60)
    assert session.requeue(0, "worker lost") is True
    assert session.slots()[0].error == "worker lost"
    assert session.requeue(0, "again") is False
    assert session.start(0, "v", 60) == 2
    assert session.finish(0, 1, SlotState.COMPLETE, losses=[9.0]) is False  # the lost worker's late answer
    assert session.finish(0, 2, SlotState.COMPLETE, losses=[2.0], worker="v") is True
    assert session.finish(0, 2, SlotState.COMPLETE, losses=[1.0]) is False
    assert session.requeue(0, "late") is False
    assert session.slots()[0].loss_nats == 2.0
    assert len(database.optuna_storage().get_all_trials(session.optuna_study_id)) == 1
    assert_one_to_one(database, session)


def test_what_cannot_be_started_is_refused(session: CoordinatorSession) -> None:
    with pytest.raises(StudyError, match="no slot 99"):
        session.start(99, "w", 60)
    with pytest.raises(StudyError, match=r"slot 0: only a proposed, waiting slot .* it is without a vector"):
        session.start(0, "w", 60)
    session.propose(0, **vector(0))
    assert session.start(0, "w", 60) == session.start(0, "w", 60) == 1  # repeated after a lost answer
    with pytest.raises(StudyError, match=r"slot 0: only a proposed, waiting slot .* it is running"):
        session.start(0, "v", 60)


def test_a_vector_never_changes(session: CoordinatorSession) -> None:
    first = session.propose(0, **vector(0))
    again = session.propose(0, **vector(0))
    assert again.trial_id == first.trial_id
    with pytest.raises(StudyError, match="slot 0 has another vector already"):
        session.propose(0, **vector(1))


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
        session.propose(0, **{**vector(0), **change})
    assert session.slots()[0].params is None
    session.propose(0, **vector(0))


def test_a_parameter_of_another_kind_is_refused_and_the_slot_stays_free(session: CoordinatorSession) -> None:
    session.propose(0, **vector(0))
    odd = {"params": {"level_0": 0.5}, "distributions": {"level_0": CategoricalDistribution((0.5,))}}
    with pytest.raises(StudyError, match="slot 1: Cannot set different distribution kind"):
        session.propose(1, **{**vector(1), **odd})
    assert session.slots()[1].params is None
    assert session.propose(1, **vector(1)).trial_id is not None


def test_finished_trials_feed_a_sampler(session: CoordinatorSession) -> None:
    for number, state in ((3, SlotState.COMPLETE), (1, SlotState.STOPPED), (0, SlotState.FAILED)):
        session.propose(number, **vector(number))
        session.finish(number, session.start(number, "w", 60), state, losses=[1.0, 2.0])
    session.propose(2, **vector(2))
    trials = session.finished_trials()
    assert [trial.number for trial in trials] == [3, 1, 0]
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=1, seed=0))
    study.add_trials(trials)
    assert study.best_value == 1.5
    assert study.trials[1].intermediate_values == {2: 1.5}
    assert study.ask({"level_0": FloatDistribution(0, 1)}).params["level_0"] <= 1


def test_extending(session: CoordinatorSession) -> None:
    assert session.extend(8) == 8
    assert session.extend(2) == 8
    assert [slot.number for slot in session.slots()] == list(range(8))


def test_a_second_coordinator_is_refused(database: Database, session: CoordinatorSession) -> None:
    other = StudyStore(database).coordinate(session.name)
    with pytest.raises(
        StudyError, match=r"another coordinator is running it \(was-search coordinator .* since .*wait for it"
    ):
        other.__enter__()
    session.propose(0, **vector(0))  # the first is not disturbed
    session.close()
    with pytest.raises(StudyError, match="session is closed"):
        session.propose(1, **vector(1))
    with other:
        assert other.epoch == session.epoch + 1


def test_a_replaced_coordinator_writes_nothing_more(database: Database, session: CoordinatorSession) -> None:
    session.propose(0, **vector(0))
    session.propose(1, **vector(1))
    attempt = session.start(0, "w", 60)
    terminate_connections(database)
    with StudyStore(database).coordinate(session.name) as newer:
        assert newer.slots()[0].state is SlotState.WAITING  # requeued, attempt kept
        assert newer.slots()[0].attempt == attempt
        with pytest.raises(StudyError, match="another coordinator is running it"):
            session.finish(0, attempt, SlotState.COMPLETE, losses=[1.0])
        with pytest.raises(StudyError, match="another coordinator is running it"):
            session.propose(2, **vector(2))
        newer.finish(0, newer.start(0, "v", 60), SlotState.COMPLETE, losses=[2.0], worker="v")
    for write in (
        lambda: session.finish(1, 1, SlotState.FAILED),
        lambda: session.start(1, "w", 60),
        lambda: session.requeue(1, ""),
        lambda: session.propose(2, **vector(2)),
        lambda: session.extend(50),
        session.reconcile,
    ):
        with pytest.raises(StudyError, match="another coordinator has taken over"):
            write()
    assert_one_to_one(database, session)


def test_the_epoch_alone_refuses_too(database: Database, session: CoordinatorSession) -> None:
    session.propose(0, **vector(0))
    with database.begin() as connection:
        connection.execute(text("UPDATE was.study SET epoch = epoch + 1 WHERE name = :n"), {"n": session.name})
    with pytest.raises(StudyError, match=r"taken over \(epoch 2, ours was 1\)"):
        session.start(0, "w", 60)


def test_a_coordinator_that_was_not_replaced_goes_on(database: Database, session: CoordinatorSession) -> None:
    session.propose(0, **vector(0))
    terminate_connections(database)
    assert session.start(0, "w", 60) == 1
    with pytest.raises(StudyError, match="another coordinator is running it"):  # it has its lock again
        StudyStore(database).coordinate(session.name).__enter__()


def test_a_restart_during_a_write_is_transient_and_repeating_mends_it(
    database: Database, session: CoordinatorSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = database.optuna_storage()
    create = storage.create_new_trial

    def restart_after(*args: object, **kwargs: object) -> int:
        created = create(*args, **kwargs)  # type: ignore[arg-type]
        terminate_connections(database)
        return created

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_new_trial", restart_after)
        with pytest.raises(TransientError, match="connection was lost"):
            session.propose(0, **vector(0))
    assert session.propose(0, **vector(0)).trial_id is not None
    attempt = session.start(0, "w", 60)
    tell = storage.set_trial_state_values

    def restart_before(*args: object, **kwargs: object) -> bool:
        terminate_connections(database)
        return tell(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(storage, "set_trial_state_values", restart_before)
        with pytest.raises(TransientError, match="connection was lost"):
            session.finish(0, attempt, SlotState.COMPLETE, losses=[1.0], worker="w")
    assert session.finish(0, attempt, SlotState.COMPLETE, losses=[1.0], worker="w") is True
    assert len(database.optuna_storage().get_all_trials(session.optuna_study_id)) == 1
    assert_one_to_one(database, session)


def test_a_study_deleted_meanwhile(database: Database) -> None:
    store = StudyStore(database)
    session = store.coordinate(new_study(database).name)
    store.delete(session.name)
    with pytest.raises(StudyError, match="was deleted"):
        session.__enter__()
