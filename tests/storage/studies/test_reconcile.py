"""After a crash at any statement, slots and trials agree one to one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.doubles.small_study import assert_one_to_one, finish, hand_out, new_study, propose, terminate_connections
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies import trials
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


class Crash(BaseException):
    """The process died here."""


class Victim:
    """Another process's database, which dies before its n-th statement or commit, of ours or Optuna's."""

    def __init__(self, database: Database) -> None:
        self._witness = database
        self._left = 0
        self.database = Database.open(database.url)
        self._optuna = self.database.optuna_storage()
        for engine in (self.database.engine, self._optuna.engine):
            event.listen(engine, "before_cursor_execute", self._count)
            event.listen(engine, "commit", self._count)

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise Crash

    @contextmanager
    def crashing(self, n: int) -> Iterator[StudyStore]:
        self._left = n
        try:
            yield StudyStore(self.database)
        finally:
            self._left = 0
            self._optuna.remove_session()
            self._optuna.engine.dispose()
            self.database.engine.dispose()
            terminate_connections(self._witness)


@pytest.fixture
def victim(database: Database) -> Iterator[Victim]:
    made = Victim(database)
    yield made
    made.database.close()


def _live(session: CoordinatorSession, number: int, state: SlotState) -> None:
    """What a coordinator does with a slot, wherever it stands."""
    slot = session.slots()[number]
    if not slot.state.finished:
        attempt = slot.attempt if slot.state is SlotState.RUNNING else hand_out(session, number)
        finish(session, number, attempt, state, losses=[1.0, 2.0], worker="w", attrs={"ppl": 4.5})


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_crash_at_any_statement_is_mended(database: Database, victim: Victim, stride: int) -> None:
    store = StudyStore(database)
    name = new_study(database, 150).name
    for number in range(150):
        state = (SlotState.STOPPED, SlotState.COMPLETE, SlotState.FAILED)[number % 3]
        crashed = False
        try:
            with victim.crashing(number * stride + 1) as dying, dying.coordinate(name) as session:
                _live(session, number, state)
        except Crash:
            crashed = True
        with store.coordinate(name) as session:
            assert_one_to_one(database, session)
            assert session.reconcile() == 0
            _live(session, number, state)
            assert session.slots()[number].state is state
            assert_one_to_one(database, session)
        if not crashed:
            break
    assert not crashed, "the last statements were not reached"
    assert number * stride > 35, f"{number * stride} statements are fewer than a slot's life has"


def test_a_crash_while_mending_is_mended(database: Database, victim: Victim) -> None:
    store = StudyStore(database)
    name = new_study(database, 4).name
    with store.coordinate(name) as session:
        for number, state in enumerate((SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED)):
            _live(session, number, state)
        hand_out(session, 3)
    crashes = 0
    for n in range(1, 300, 3):
        known = store.get(name).optuna_study_id
        assert known is not None
        database.optuna_storage().delete_study(known)  # everything is to be created and told again
        before = crashes
        for boundary in (n, n // 2 + 5):
            try:
                with victim.crashing(boundary) as dying, dying.coordinate(name):
                    pass
            except Crash:
                crashes += 1
        with store.coordinate(name) as session:
            assert_one_to_one(database, session)
        if crashes == before:
            break
    assert crashes > 20


def test_duplicates_fail_and_trials_made_by_hand_stay(database: Database) -> None:
    store = StudyStore(database)
    name = new_study(database, 3).name
    storage = database.optuna_storage()
    with store.coordinate(name) as session:
        propose(session, 0)
        study_id = session.optuna_study_id
        by_hand = storage.create_new_trial(study_id)
        template = storage.get_trial(session.slots()[0].trial_id or 0)
        duplicate = storage.create_new_trial(study_id, template_trial=template)
        template.user_attrs[trials.SLOT_ATTR] = 2  # a slot without a vector
        orphan = storage.create_new_trial(study_id, template_trial=template)
        assert session.reconcile() == 2
        assert session.reconcile() == 0
        for surplus in (duplicate, orphan):
            trial = storage.get_trial(surplus)
            assert trial.state.name == "FAIL"
            assert trial.user_attrs["error"].startswith("surplus trial of slot")
        assert storage.get_trial(by_hand).state.name == "RUNNING"
        storage.set_trial_state_values(by_hand, trials.TrialState.FAIL)
        assert_one_to_one(database, session, surplus=3)


def test_running_slots_of_an_earlier_coordinator_wait_again(database: Database) -> None:
    store = StudyStore(database)
    name = new_study(database, 2).name
    with store.coordinate(name) as session:
        for number in (0, 1):
            hand_out(session, number)
        assert session.reconcile() == 0  # its own are left alone
        before = session.slots()
    with store.coordinate(name) as session:
        assert session.repaired == 2
        after = session.slots()
        assert [slot.state for slot in after] == [SlotState.WAITING] * 2
        assert [(s.attempt, s.trial_id, s.params) for s in after] == [(s.attempt, s.trial_id, s.params) for s in before]
        assert hand_out(session, 0) == 2
    with database.begin() as connection:
        leases = connection.execute(
            text("SELECT lease_expires_at > now() FROM was.slot WHERE state = 'running' AND study_id = :id"),
            {"id": store.get(name).id},
        )
        assert leases.scalars().all() == [True]
