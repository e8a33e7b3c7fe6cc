"""Studies: made once, taken up again, refused where they differ."""

from __future__ import annotations

import threading
import uuid

import optuna
import pytest
from sqlalchemy import text

from tests.doubles.small_study import IDENTITY, SHAPE, assert_one_to_one, finish, hand_out, new_study, propose, vector
from was_search.errors import StudyError
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


@pytest.fixture
def store(database: Database) -> StudyStore:
    return StudyStore(database)


def test_a_new_study_has_waiting_slots_and_an_optuna_study(database: Database, store: StudyStore) -> None:
    record = new_study(database, 3)
    assert (record.n_slots, record.counts[SlotState.WAITING], record.best_loss_nats) == (3, 3, None)
    assert set(record.counts) == set(SlotState)
    assert record.identity == IDENTITY
    assert record.shape == SHAPE.to_json()
    assert record.report == {}
    assert "optuna" in record.versions
    study = optuna.load_study(study_name=record.name, storage=database.optuna_storage())
    assert study._study_id == record.optuna_study_id
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert store.get(record.name) == record


def test_opening_again_extends_and_updates_but_never_shrinks(store: StudyStore) -> None:
    name = uuid.uuid4().hex
    for asked, expected in ((2, 2), (5, 5), (3, 5)):
        record = store.open_or_create(name, identity={}, config={"n": asked}, shape={}, n_slots=asked)
        assert record.n_slots == expected
        assert record.config == {"n": asked}


def test_identity_is_compared_as_stored(store: StudyStore) -> None:
    identity = {"pair": (1, 2), "nested": {1: float("nan")}, "budget": 0.1 + 0.2}
    name = uuid.uuid4().hex
    first = store.open_or_create(name, identity=identity, config={}, shape={}, n_slots=1)
    again = store.open_or_create(name, identity=identity, config={}, shape={}, n_slots=1)
    assert first.id == again.id


def test_each_difference_is_listed(store: StudyStore) -> None:
    name = uuid.uuid4().hex
    store.open_or_create(name, identity={"model": "a", "same": 1, "old": 2}, config={}, shape={}, n_slots=1)
    with pytest.raises(StudyError) as caught:
        store.open_or_create(name, identity={"model": "b", "same": 1, "new": "x" * 500}, config={}, shape={}, n_slots=9)
    message = str(caught.value)
    assert "exists with other settings; choose another name" in message
    assert "model: study has a, asked for b" in message
    assert "old: study has 2, asked for nothing" in message
    assert "new: study has nothing, asked for xxx" in message
    assert "same" not in message.replace("the same settings", "")
    assert len(message) < 500
    assert store.get(name).n_slots == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "1 to 200 characters, got 0"),
        ("x" * 201, "1 to 200 characters, got 201"),
        ("a\nb", "must be printable"),
        ("a\0b", "must be printable"),
        (" a", "without blanks at its ends"),
    ],
)
def test_bad_names_are_refused(store: StudyStore, name: str, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        store.open_or_create(name, identity={}, config={}, shape={}, n_slots=1)


def test_a_study_needs_a_trial(store: StudyStore) -> None:
    with pytest.raises(StudyError, match="at least 1 trial, got 0"):
        store.open_or_create("none", identity={}, config={}, shape={}, n_slots=0)


def test_names_with_odd_characters_work(database: Database, store: StudyStore) -> None:
    name = "Llama 70 % 'best'; --été: {x}" + uuid.uuid4().hex
    record = new_study(database, 1, name)
    assert store.get(name) == record
    store.delete(name)


def test_a_foreign_optuna_study_of_that_name_is_refused(database: Database, store: StudyStore) -> None:
    name = uuid.uuid4().hex
    foreign = optuna.create_study(study_name=name, storage=database.optuna_storage())
    foreign.add_trial(optuna.create_trial(value=1.0, params={}, distributions={}))
    with pytest.raises(StudyError, match="was-search did not make"):
        new_study(database, 1, name)
    assert name not in [record.name for record in store.list()]


def test_an_empty_optuna_study_left_by_a_crash_is_taken(database: Database) -> None:
    name = uuid.uuid4().hex
    left = optuna.create_study(study_name=name, storage=database.optuna_storage())
    assert new_study(database, 1, name).optuna_study_id == left._study_id


def test_a_crash_while_creating_leaves_nothing_half_made(
    database: Database, store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = uuid.uuid4().hex
    storage = database.optuna_storage()
    create = storage.create_new_study

    def crash_after(*args: object, **kwargs: object) -> int:
        create(*args, **kwargs)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_new_study", crash_after)
        with pytest.raises(KeyboardInterrupt):
            new_study(database, 2, name)
    assert name not in [record.name for record in store.list()]
    assert new_study(database, 2, name).n_slots == 2


def test_many_may_create_the_same_study_at_once(database: Database) -> None:
    name = uuid.uuid4().hex
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(new_study(database, 3, name))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(record == found[0] for record in found)


def test_a_missing_study_lists_the_others(database: Database, store: StudyStore) -> None:
    record = new_study(database)
    with pytest.raises(StudyError, match=rf"study 'nope' does not exist; this database has .*{record.name}"):
        store.get("nope")
    for call in (store.delete, store.coordinate, lambda name: store.set_report(name, {})):
        with pytest.raises(StudyError, match="'nope' does not exist"):
            call("nope")


def test_counts_and_best_loss(database: Database, store: StudyStore) -> None:
    name = new_study(database, 5).name
    with store.coordinate(name) as session:
        for number, (state, losses) in enumerate(
            [(SlotState.COMPLETE, [2.0, 4.0]), (SlotState.COMPLETE, [2.5]), (SlotState.STOPPED, [1.0])]
        ):
            finish(session, number, hand_out(session, number), state, losses=losses)
    record = store.get(name)
    assert record.best_loss_nats == 2.5
    assert record.counts == {
        SlotState.WAITING: 2,
        SlotState.RUNNING: 0,
        SlotState.COMPLETE: 2,
        SlotState.STOPPED: 1,
        SlotState.FAILED: 0,
    }
    assert record in store.list()


def test_reports_are_kept(database: Database, store: StudyStore) -> None:
    name = new_study(database).name
    store.set_report(name, {"ppl": 5.5, "bad": float("inf")})
    assert store.get(name).report == {"ppl": 5.5, "bad": None}


def test_deleting_removes_everything(database: Database, store: StudyStore) -> None:
    record = new_study(database)
    with store.coordinate(record.name) as session:
        propose(session, 0)
        with pytest.raises(StudyError, match="being run by a coordinator; stop it before"):
            store.delete(record.name)
    store.delete(record.name)
    assert record.name not in [other.name for other in store.list()]
    assert record.name not in optuna.get_all_study_names(database.optuna_storage())
    with database.begin() as connection:
        query = text("SELECT count(*) FROM was.slot WHERE study_id = :id")
        assert connection.execute(query, {"id": record.id}).scalar() == 0


def test_a_study_deleted_in_the_dashboard_is_made_anew_from_the_slots(database: Database, store: StudyStore) -> None:
    name = new_study(database, 4).name
    with store.coordinate(name) as session:
        for number, state in enumerate((SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED)):
            attempt = hand_out(session, number, attrs={"note": "kept"})
            finish(session, number, attempt, state, losses=[1.0, 3.0], error="x")
        gone = session.optuna_study_id
    database.optuna_storage().delete_study(gone)
    with store.coordinate(name) as session:
        assert session.optuna_study_id != gone
        assert session.repaired > 0
        assert_one_to_one(database, session)
        trials = database.optuna_storage().get_all_trials(session.optuna_study_id)
    assert [trial.user_attrs["note"] for trial in trials] == ["kept"] * 3
    assert store.get(name).optuna_study_id == session.optuna_study_id


def test_slots_are_read_without_the_coordinators_lock(database: Database, store: StudyStore) -> None:
    name = new_study(database, 2).name
    with store.coordinate(name) as session:
        propose(session, 1)
        assert [slot.params for slot in store.slots(name)] == [None, vector(1)["params"]]
    with pytest.raises(StudyError, match="'nope' does not exist"):
        store.slots("nope")
