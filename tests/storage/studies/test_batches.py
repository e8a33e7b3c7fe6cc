"""Slots handed out and finished several at a time: what Optuna's API would leave, with and without crashes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg2
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from tests.doubles.small_study import DISTRIBUTIONS, TOLD, assert_one_to_one, new_study, propose, vector
from tests.storage.studies.test_reconcile import Crash, Victim
from was_search.errors import StudyError, TransientError
from was_search.studies.hand_outs import HandOut, Proposal, Result
from was_search.studies.slots import Slot, SlotState
from was_storage.server.database import Database
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres

STATES = (SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED)
ATTRS = {"nominal_sparsity": 0.6, "why": float("nan"), "words": 'quo"te\\ : é', "nested": [[1, 2.5], {"a": None}]}


def proposal(number: int, **changes: Any) -> Proposal:
    return Proposal(**{**vector(number), "attrs": ATTRS, **changes})


def hand_outs(numbers: range, worker: str = "w") -> list[HandOut]:
    return [HandOut(number, f"{worker}{number}", proposal(number)) for number in numbers]


def result(number: int, attempt: int = 1, state: SlotState | None = None, **changes: Any) -> Result:
    losses = np.array([1.0, 1 / 3, 2.0 + number])
    values = {
        "state": state or STATES[number % 3], "losses": losses, "loss_nats": float(losses.mean()), "nll_nats": 0.1,
        "tokens": 2**40, "seconds": 1.25, "achieved": 0.6012345678901234, "worker": f"w{number}", "error": "",
        "attrs": {"perplexity": 7.1 / 3},
    }  # fmt: skip
    return Result(number, attempt, **{**values, **changes})


@pytest.fixture
def session(database: Database) -> Iterator[CoordinatorSession]:
    with StudyStore(database).coordinate(new_study(database, 8).name) as opened:
        yield opened


def live(session: CoordinatorSession) -> None:
    """A study of finished, running and untouched slots."""
    assert session.begin(hand_outs(range(6)), 60) == [1] * 6
    assert session.finish_all([result(number) for number in range(4)]) == [True] * 4
    odd = result(4, losses=np.array([1.0, np.inf, np.nan]), loss_nats=None, error="x\0y")
    assert session.finish_all([odd]) == [True]


def live_through_the_api(storage: BaseStorage, study_id: int) -> None:
    """The trials of :func:`live`, made and told one by one."""
    for number in range(6):
        levels = [round(0.5 - number / 1000, 4), round(0.7 - number / 1000, 4)]
        template = create_trial(
            state=TrialState.RUNNING,
            params=vector(number)["params"],
            distributions=DISTRIBUTIONS,
            user_attrs={"slot": number, "origin": "sampler:tpe", "levels": levels, **ATTRS, "why": None},
        )
        assert storage.get_trial_number_from_id(storage.create_new_trial(study_id, template_trial=template)) == number
    for number, trial in enumerate(storage.get_all_trials(study_id)[:5]):
        losses = [1.0, 1 / 3, 2.0 + number] if number < 4 else [1.0]
        found = {
            "n": 3,
            "not_finite": 3 - len(losses),
            "mean_nats": float(np.mean(losses)),
            "std_nats": float(np.std(losses, ddof=1)) if number < 4 else None,
        }
        state = STATES[number % 3] if number < 4 else SlotState.FAILED
        attrs = {
            "attempt": 1, "worker": f"w{number}", "seconds": 1.25, "tokens": 2**40, "losses": found,
            "achieved_sparsity": 0.6012345678901234, "stopped_early": state is SlotState.STOPPED,
            "perplexity": 7.1 / 3, **({"error": "xy"} if number == 4 else {}),
        }  # fmt: skip
        for key, value in attrs.items():
            storage.set_trial_user_attr(trial._trial_id, key, value)
        if state is SlotState.STOPPED:
            storage.set_trial_intermediate_value(trial._trial_id, 3, found["mean_nats"])
        values = [found["mean_nats"]] if state is SlotState.COMPLETE else None
        storage.set_trial_state_values(trial._trial_id, TOLD[state], values)


def comparable(trial: FrozenTrial) -> dict[str, Any]:
    return {key: value for key, value in vars(trial).items() if "trial_id" not in key and "datetime" not in key}


def test_trials_are_those_of_optunas_api(database: Database, session: CoordinatorSession) -> None:
    """Read with Optuna's own reader; only ids and times differ."""
    storage = database.optuna_storage()
    stock_study = storage.create_new_study([StudyDirection.MINIMIZE])
    live(session)
    live_through_the_api(storage, stock_study)
    ours, stock = (storage.get_all_trials(study_id) for study_id in (session.optuna_study_id, stock_study))
    assert [comparable(trial) for trial in ours] == [comparable(trial) for trial in stock]
    for a, b in zip(ours, stock, strict=True):
        for name in ("datetime_start", "datetime_complete"):
            mine, other = getattr(a, name), getattr(b, name)
            assert (mine is None) == (other is None)
            # The same time zone, not the same moment.
            assert mine is None or abs((mine - other).total_seconds()) < 600
    assert_one_to_one(database, session)
    assert session.reconcile() == 0


def test_slots_hold_what_was_proposed_and_found(session: CoordinatorSession) -> None:
    live(session)
    slots = session.slots()
    states = [SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED, SlotState.COMPLETE, SlotState.FAILED]
    assert [slot.state for slot in slots] == [*states, SlotState.RUNNING, SlotState.WAITING, SlotState.WAITING]
    assert all(type(slot.state) is SlotState for slot in slots)
    for number, slot in enumerate(slots[:6]):
        assert (slot.origin, slot.params, slot.attempt) == ("sampler:tpe", vector(number)["params"], 1)
        np.testing.assert_array_equal(slot.levels, vector(number)["levels"])
        np.testing.assert_array_equal(slot.sparsities, vector(number)["sparsities"])
        assert slot.worker == f"w{number}"
    for number, slot in enumerate(slots[:5]):
        given = result(number)
        assert (slot.tokens, slot.seconds, slot.achieved) == (given.tokens, given.seconds, given.achieved)
        np.testing.assert_array_equal(slot.losses, given.losses if number < 4 else [1.0, np.inf, np.nan])
        assert (slot.loss_nats, slot.nll_nats) == ((given.loss_nats, 0.1) if number < 4 else (None, None))
        assert slot.error == ("xy" if number == 4 else "")


def test_few_statements_whatever_the_number(database: Database, session: CoordinatorSession) -> None:
    counts: list[int] = []
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
    for number in (0, 1):  # what kinds of parameters there are is asked until they are found
        session.begin(hand_outs(range(number, number + 1)), 60)
    for numbers in (range(2, 3), range(3, 8)):
        statements.clear()
        session.begin(hand_outs(numbers), 60)
        session.finish_all([result(number, state=SlotState.STOPPED) for number in numbers])
        counts.append(len(statements))
    assert counts[0] == counts[1] <= 20


def test_repeating_after_a_lost_answer_changes_nothing(database: Database, session: CoordinatorSession) -> None:
    first = hand_outs(range(3))
    assert session.begin(first, 60) == session.begin(first, 60) == [1, 1, 1]
    commits: list[int] = []

    def lose_the_answer(connection: Any) -> None:
        commits.append(1)
        if len(commits) == 1:
            connection.connection.dbapi_connection.commit()
            lost = psycopg2.OperationalError("server closed the connection unexpectedly")
            raise OperationalError("COMMIT", {}, lost)

    event.listen(database.engine, "commit", lose_the_answer)
    try:
        with pytest.raises(TransientError, match="connection was lost"):
            session.finish_all([result(0), result(1), result(1)])
    finally:
        event.remove(database.engine, "commit", lose_the_answer)
    assert session.finish_all([result(0), result(1), result(1)]) == [True, True, False]
    assert session.finish_all([result(0), result(1), result(2)]) == [False, False, True]
    assert_one_to_one(database, session)


def test_only_the_attempt_that_runs_counts(database: Database, session: CoordinatorSession) -> None:
    session.begin(hand_outs(range(2)), 60)
    session.requeue(0, "worker lost")
    assert session.begin([HandOut(0, "v")], 60) == [2]
    assert session.finish_all([result(0, 1), result(1, 1)]) == [False, True]
    assert session.finish_all([result(0, 2, SlotState.COMPLETE, loss_nats=1.5)]) == [True]
    assert session.slots()[0].loss_nats == 1.5
    assert_one_to_one(database, session)


def test_a_vector_without_its_trial_gets_one(database: Database, session: CoordinatorSession) -> None:
    propose(session, 0)
    propose(session, 1)
    trial_id = session.slots()[1].trial_id
    assert trial_id is not None
    database.optuna_storage().set_trial_state_values(trial_id, TrialState.FAIL)
    with database.begin() as connection:
        forget = text("UPDATE was.slot SET trial_id = NULL WHERE study_id = :id AND number = 1")
        connection.execute(forget, {"id": session.study_id})
    assert session.begin([HandOut(0, "w"), HandOut(1, "w")], 60) == [2, 2]
    assert_one_to_one(database, session, surplus=1)


def test_what_is_refused_leaves_all_as_it_was(database: Database, session: CoordinatorSession) -> None:
    session.begin(hand_outs(range(1)), 60)
    odd = {"params": {"level_0": 0.5}, "distributions": {"level_0": CategoricalDistribution((0.5,))}}
    for refused, words in (
        (HandOut(2, "w"), "slot 2: only a proposed, waiting slot can be started, it is without a vector"),
        (HandOut(0, "v"), "slot 0: only a proposed, waiting slot can be started, it is running"),
        (HandOut(0, "w0", proposal(5)), "slot 0 has another vector already"),
        (HandOut(99, "w"), "no slot 99"),
        (HandOut(2, "w", proposal(2, **odd)), "slot 2: Cannot set different distribution kind"),
        (HandOut(2, "w", proposal(2, levels=[0.5])), "1 levels need shape"),
    ):
        with pytest.raises(StudyError, match=words):
            session.begin([HandOut(1, "w", proposal(1)), refused], 60)
        assert [slot.state for slot in session.slots()[:3]] == [SlotState.RUNNING] + [SlotState.WAITING] * 2
        assert session.slots()[1].params is None
    with pytest.raises(StudyError, match="complete, stopped or failed, got running"):
        session.finish_all([result(0, state=SlotState.RUNNING)])
    assert_one_to_one(database, session)


def test_two_kinds_of_one_new_parameter_are_refused(session: CoordinatorSession) -> None:
    odd = {"params": {"level_0": 0.5}, "distributions": {"level_0": CategoricalDistribution((0.5,))}}
    with pytest.raises(StudyError, match="slot 1: Cannot set different distribution kind"):
        session.begin([HandOut(0, "w", proposal(0)), HandOut(1, "v", proposal(1, **odd))], 60)
    assert session.begin([HandOut(1, "v", proposal(1, **odd))], 60) == [1]  # alone it is the first


def test_a_mirror_deleted_while_it_runs(database: Database, session: CoordinatorSession) -> None:
    database.optuna_storage().delete_study(session.optuna_study_id)
    with pytest.raises(StudyError, match="its Optuna study was deleted while it ran; start the search again"):
        session.begin(hand_outs(range(1)), 60)
    assert session.slots()[0].params is None


def test_trials_made_by_others_do_not_disturb_the_numbers(database: Database, session: CoordinatorSession) -> None:
    storage = database.optuna_storage()
    session.begin(hand_outs(range(2)), 60)
    by_hand = storage.create_new_trial(session.optuna_study_id)
    session.begin(hand_outs(range(2, 4)), 60)
    storage.set_trial_state_values(by_hand, TrialState.FAIL)
    assert [t.number for t in storage.get_all_trials(session.optuna_study_id)] == list(range(5))
    assert_one_to_one(database, session, surplus=1)


def test_a_trial_told_by_others_is_left_alone(database: Database, session: CoordinatorSession) -> None:
    storage = database.optuna_storage()
    session.begin(hand_outs(range(1)), 60)
    trial_id = session.slots()[0].trial_id
    assert trial_id is not None
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [9.0])
    assert session.finish_all([result(0)]) == [True]
    assert storage.get_trial(trial_id).value == 9.0
    assert session.slots()[0].loss_nats != 9.0


def test_a_replaced_coordinator_hands_out_nothing(database: Database, session: CoordinatorSession) -> None:
    session.begin(hand_outs(range(1)), 60)
    with database.begin() as connection:
        connection.execute(text("UPDATE was.study SET epoch = epoch + 1 WHERE name = :n"), {"n": session.name})
    for write in (lambda: session.begin(hand_outs(range(1, 2)), 60), lambda: session.finish_all([result(0)])):
        with pytest.raises(StudyError, match="another coordinator has taken over"):
            write()


def test_slots_read_in_binary_are_the_stored_ones(session: CoordinatorSession) -> None:
    """Every double, whatever its bits; empty and missing arrays."""
    odd = [1 / 3, 5e-324, -0.0, 1.7976931348623157e150, math.pi]
    session.begin(hand_outs(range(3)), 60)
    session.finish_all([
        result(0, state=SlotState.COMPLETE, losses=np.array(odd), loss_nats=2.0),
        result(1, state=SlotState.STOPPED, losses=[], loss_nats=None), result(2, state=SlotState.FAILED, losses=None),
    ])  # fmt: skip
    slots: list[Slot] = session.slots()
    assert slots[0].losses is not None
    assert slots[0].losses.tobytes() == np.array(odd).tobytes()
    assert slots[1].losses is not None
    assert slots[1].losses.shape == (0,)
    assert slots[2].losses is None


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_crash_at_any_statement_loses_nothing(database: Database, stride: int) -> None:
    """Handing out and finishing two slots at once; a dead process leaves both or neither, to be requeued at most."""
    victim = Victim(database)
    store = StudyStore(database)
    name = new_study(database, 150).name
    crashed, at, first = True, 1, 0
    while crashed:
        pair = range(first, first + 2)
        crashed = False
        try:
            with victim.crashing(at) as dying, dying.coordinate(name) as session:
                attempts = session.begin(hand_outs(pair), 60)
                session.finish_all([result(n, a) for n, a in zip(pair, attempts, strict=True)])
        except Crash:
            crashed = True
        with store.coordinate(name) as session:
            slots = session.slots()[first : first + 2]
            assert slots[0].state.finished == slots[1].state.finished
            assert (slots[0].params is None) == (slots[1].params is None)
            left = 0 if slots[0].state.finished else int(slots[0].attempt > 0) * 2
            assert session.repaired == left
            assert_one_to_one(database, session)
            if not slots[0].state.finished:
                again = [HandOut(s.number, "v", proposal(s.number) if s.params is None else None) for s in slots]
                attempts = session.begin(again, 60)
                assert session.finish_all([result(n, a) for n, a in zip(pair, attempts, strict=True)]) == [True] * 2
            assert_one_to_one(database, session)
        at, first = at + stride, first + 2
    assert at > 40, "fewer statements than taking over, handing out and finishing have"
    victim.database.close()
