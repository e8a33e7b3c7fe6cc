"""What is asked of a study, on a real Postgres: with and without a living coordinator."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import text

from tests.doubles.small_study import IDENTITY, SHAPE, finish, hand_out, new_study, propose, terminate_connections
from was_search.errors import StudyError, TransientError
from was_search.studies.control import TOGETHER, Control, Ending, EndingKind, Overrides, Spent, Usage, Wish
from was_search.studies.overview import overview
from was_search.studies.pool_state import PoolState, Quarantined
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.control import ControlSession, ControlStore
from was_storage.studies.overview import read_snapshot
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


@pytest.fixture
def store(database: Database) -> ControlStore:
    return ControlStore(database)


def reopen(database: Database, name: str, n_slots: int, **config: object) -> None:
    StudyStore(database).open_or_create(name, identity=IDENTITY, config=config, shape=SHAPE.to_json(), n_slots=n_slots)


def numbers(database: Database, name: str) -> list[int]:
    return [slot.number for slot in StudyStore(database).slots(name)]


def test_a_new_study_is_to_run(database: Database, store: ControlStore) -> None:
    name = new_study(database, 3).name
    assert store.read(name) == Control(Wish.RUN, Overrides(), 3)


def test_wishes_need_no_lock_and_say_whether_someone_obeys(database: Database, store: ControlStore) -> None:
    name = new_study(database).name
    assert store.wish(name, Wish.PAUSE) is False
    with StudyStore(database).coordinate(name):
        assert store.wish(name, Wish.DRAIN) is True
        assert store.read(name).wish is Wish.DRAIN
    assert store.set(name, Overrides(max_failures=3)) is False
    assert store.read(name).overrides == Overrides(max_failures=3)


def test_unknown_studies(store: ControlStore) -> None:
    for call in (
        lambda: store.wish("nope", Wish.PAUSE),
        lambda: store.set("nope", Overrides(workers=2)),
        lambda: store.read("nope"),
    ):
        with pytest.raises(StudyError, match="study 'nope' does not exist; this database has"):
            call()


def test_trials_are_added_at_once_and_dropped_where_nothing_is_known_of_them(
    database: Database, store: ControlStore
) -> None:
    name = new_study(database, 4).name
    store.set(name, Overrides(trials=9))
    assert numbers(database, name) == list(range(9))
    with StudyStore(database).coordinate(name) as session:
        for number in (0, 1, 2):
            propose(session, number)
        finish(session, 0, hand_out(session, 0), SlotState.COMPLETE, losses=[1.0])
        hand_out(session, 1)
    with pytest.raises(StudyError, match=r"trials: must be at least 3, got 2: .* 1 of them finished"):
        store.set(name, Overrides(trials=2, workers=7))
    assert numbers(database, name) == list(range(9))
    assert store.read(name).overrides == Overrides(trials=9), "what is refused changes nothing"
    store.set(name, Overrides(trials=3))
    assert numbers(database, name) == [0, 1, 2]


def test_beside_a_coordinator_fewer_trials_are_left_to_it(database: Database, store: ControlStore) -> None:
    name = new_study(database, 8).name
    with StudyStore(database).coordinate(name) as session:
        assert store.set(name, Overrides(trials=2)) is True
        assert store.read(name) == Control(Wish.RUN, Overrides(trials=2), 8)
        propose(session, 4)  # chosen before it has read what is asked
        assert session.shrink(2) == 5
        assert session.shrink(2) == 5
        assert numbers(database, name) == list(range(5))
        assert store.set(name, Overrides(trials=6)) is True  # more are there at once
        assert numbers(database, name) == list(range(6))


def test_a_change_of_trials_waits_for_the_coordinators_transaction(database: Database, store: ControlStore) -> None:
    """A slot that is being given its vector cannot vanish meanwhile."""
    name = new_study(database, 2).name
    refused: list[StudyError] = []

    def shrink() -> None:
        try:
            store.set(name, Overrides(trials=1))
        except StudyError as error:
            refused.append(error)

    with StudyStore(database).coordinate(name) as session:
        other = threading.Thread(target=shrink)
        with session._fence.transaction() as connection:
            other.start()
            other.join(timeout=1.0)
            assert other.is_alive()
            values = "params = '{}', levels = '{0.5}'"
            connection.execute(
                text(f"UPDATE was.slot SET {values} WHERE study_id = :i AND number = 1"), {"i": session.study_id}
            )
        other.join(timeout=300)
    assert len(refused) == 1
    assert "must be at least 2, got 1" in str(refused[0])


def test_what_was_set_holds_until_a_run_says_otherwise(database: Database, store: ControlStore) -> None:
    name = new_study(database, 4).name
    reopen(database, name, 4, trials=4, workers=1, max_seconds=0.0)
    store.set(name, Overrides(trials=2, workers=5, max_seconds=60.0, patience=3))
    reopen(database, name, 4, trials=4, workers=1, max_seconds=0.0)  # the same command
    assert store.read(name) == Control(Wish.RUN, Overrides(2, 5, 60.0, None, None, 3), 2)
    reopen(database, name, 4, trials=4, workers=2, max_seconds=0.0)  # another number of workers
    assert store.read(name).overrides == Overrides(2, None, 60.0, None, None, 3)
    reopen(database, name, 6, trials=6, workers=2, max_seconds=30.0)
    assert store.read(name) == Control(Wish.RUN, Overrides(patience=3), 6)


def test_a_run_takes_old_drains_back_and_no_others(database: Database, store: ControlStore) -> None:
    name = new_study(database).name
    for wish, expected in ((Wish.DRAIN, Wish.RUN), (Wish.CANCEL, Wish.RUN), (Wish.PAUSE, Wish.PAUSE)):
        store.wish(name, wish)
        asked_since = store.now()
        with StudyStore(database).coordinate(name) as session:
            control = ControlSession(database, session)
            assert control.open(gpus_per_worker=0.0, asked_since=asked_since) is wish
            assert control.read().wish is expected
    asked_since = store.now()
    store.wish(name, Wish.DRAIN)  # while the command was still calibrating
    with StudyStore(database).coordinate(name) as session:
        control = ControlSession(database, session)
        assert control.open(gpus_per_worker=0.0, asked_since=asked_since) is Wish.DRAIN
        assert control.read().wish is Wish.DRAIN


def test_runs_are_written_down_and_add_up(database: Database, store: ControlStore) -> None:
    name = new_study(database).name
    for seconds in (10.0, 5.0):
        with StudyStore(database).coordinate(name) as session:
            control = ControlSession(database, session)
            control.open(gpus_per_worker=0.5, asked_since=store.now())
            control.open(gpus_per_worker=0.5, asked_since=store.now())  # repeated after a lost connection
            control.beat(Usage(Spent(seconds, 2 * seconds), 4 * seconds, workers=4))
            snapshot = read_snapshot(database, name)
            assert (snapshot.alive, overview(snapshot).play, overview(snapshot).workers) == (True, "running", 4)
            if seconds == 5.0:
                assert control.spent_before() == Spent(10.0, 20.0)
                control.close(Ending(EndingKind.STOPPED, "patience: no better\0 loss"))
            # the first one dies without a word
        found = overview(read_snapshot(database, name))
        assert found.play == {10.0: "lost", 5.0: "stopped"}[seconds]
    assert found.play_detail.startswith("patience: no better loss")
    assert found.gpu_hours == pytest.approx(30.0 / 3600)
    assert len(read_snapshot(database, name).runs) == 2


def test_what_several_studies_have_spent_together(database: Database, store: ControlStore) -> None:
    names = [new_study(database).name for _ in range(3)]
    for name, seconds in zip(names, (10.0, 5.0, 2.5), strict=True):
        with StudyStore(database).coordinate(name) as session:
            control = ControlSession(database, session)
            control.open(gpus_per_worker=1.0, asked_since=store.now())
            control.beat(Usage(Spent(seconds, 2 * seconds)))
    assert store.spent(names[:2]) == Spent(15.0, 30.0)
    assert store.spent([names[2], "nope"]) == Spent(2.5, 5.0)
    assert store.spent([]) == Spent()
    reopen(database, names[0], 4, **{TOGETHER: names, "max_seconds": 100.0})
    assert read_snapshot(database, names[0]).elsewhere == Spent(7.5, 15.0)
    assert read_snapshot(database, names[1]).elsewhere == Spent()


def test_what_a_run_is_at_is_shown_until_it_ends(database: Database, store: ControlStore) -> None:
    name = new_study(database).name
    with StudyStore(database).coordinate(name) as session:
        control = ControlSession(database, session)
        control.open(gpus_per_worker=0.0, asked_since=store.now())
        control.beat(Usage(activity="descent 1 of 2"))
        assert overview(read_snapshot(database, name)).play_detail.startswith("descent 1 of 2, by ")
        control.beat(Usage())
        assert overview(read_snapshot(database, name)).play_detail.startswith("by ")
        control.beat(Usage(activity="descent 2 of 2"))
        control.close(Ending(EndingKind.STOPPED, "patience: enough"))
    assert overview(read_snapshot(database, name)).play_detail.startswith("patience: enough, ")


def test_a_replaced_coordinator_writes_into_its_own_run_only(database: Database, store: ControlStore) -> None:
    name = new_study(database).name
    with StudyStore(database).coordinate(name) as session:
        old = ControlSession(database, session)
        old.open(gpus_per_worker=0.0, asked_since=store.now())
    with StudyStore(database).coordinate(name) as session:
        ControlSession(database, session).open(gpus_per_worker=0.0, asked_since=store.now())
        old.beat(Usage(paused=True, workers=9))
        old.close(Ending(EndingKind.FAILED, "replaced"))
        found = overview(read_snapshot(database, name))
    assert (found.play, found.workers) == ("running", 0)


def test_a_run_is_told_when_the_study_is_gone(database: Database, store: ControlStore) -> None:
    name = new_study(database).name
    with StudyStore(database).coordinate(name) as session:
        control = ControlSession(database, session)
    StudyStore(database).delete(name)
    with pytest.raises(StudyError, match="the study was deleted"):
        control.read()


def test_lost_connections_are_transient(database: Database, store: ControlStore) -> None:
    """Every call may be repeated and then succeeds; none reports anything else."""
    name = new_study(database).name
    session = StudyStore(database).coordinate(name)
    with session:
        control = ControlSession(database, session)
        control.open(gpus_per_worker=1.0, asked_since=store.now() - timedelta(hours=1))
        for call in (
            control.read,
            control.spent_before,
            lambda: control.beat(Usage()),
            lambda: store.wish(name, Wish.PAUSE),
        ):
            terminate_connections(database)
            try:
                call()
            except TransientError:
                call()
    assert store.read(name).wish is Wish.PAUSE


def test_a_snapshot_counts_sequences_and_reads_no_arrays(database: Database) -> None:
    name = new_study(database, 3).name
    with StudyStore(database).coordinate(name) as session:
        finish(session, 0, hand_out(session, 0), SlotState.COMPLETE, losses=[2.0, 4.0], nll_nats=3.0)
        finish(session, 1, hand_out(session, 1), SlotState.FAILED, error="CUDA")
        snapshot = read_snapshot(database, name)
    assert [slot.sequences for slot in snapshot.slots] == [2, 0, 0]
    found = overview(snapshot)
    assert (found.best.number, found.best.loss_nats, found.failures) == (0, 3.0, {"CUDA": 1})
    assert found.play == "starting"  # it holds the study and has not begun to search
    assert overview(read_snapshot(database, name)).play == "idle"


def test_a_range_of_workers_is_asked_for_and_a_pool_written_down(database: Database, store: ControlStore) -> None:
    name = new_study(database, 4).name
    reopen(database, name, 4, workers=4)
    store.set(name, Overrides(workers="2:64"))
    assert store.read(name).overrides.given == {"workers": "2:64"}
    reopen(database, name, 4, workers=4)
    assert store.read(name).overrides.workers == "2:64", "the same command does not take it back"
    store.set(name, Overrides(workers="8"))
    assert store.read(name).overrides.workers == 8
    reopen(database, name, 4, workers="2:16")
    assert store.read(name).overrides.workers is None
    held = Quarantined("worker-3@h:7", "slow", "2026-01-01T00:00:00+00:00")
    pool = PoolState("2:16", ready=2, pending=14, quarantined=(held,))
    with StudyStore(database).coordinate(name) as session:
        control = ControlSession(database, session)
        control.open(gpus_per_worker=1.0, asked_since=store.now())
        assert overview(read_snapshot(database, name)).pool == PoolState()
        control.beat(Usage(Spent(1.0, 2.0), 2.0, workers=2, pool=pool))
        found = overview(read_snapshot(database, name))
    assert (found.workers, found.pool) == (2, pool)
