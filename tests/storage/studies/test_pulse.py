"""A coordinator is seen alive while it lives; one that is not is dead, whoever holds its lock."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest
from sqlalchemy import select, text

from tests.doubles.small_study import finish, hand_out, new_study, terminate_connections
from tests.places.pgbouncer import PgBouncer, needs_pgbouncer, pgbouncer
from tests.places.users import ROOT
from was_search.errors import StorageError, StudyError, TransientError
from was_search.studies.overview import overview
from was_search.studies.slots import SlotState
from was_storage.dashboard import study_page
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer
from was_storage.server.schema import study
from was_storage.server.urls import parse_url
from was_storage.studies import coordinator_lock, pulse
from was_storage.studies.overview import read_snapshot
from was_storage.studies.pulse import Pulse
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres

COORDINATOR = """
import sys
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore
with Database.open(sys.argv[1]) as database, StudyStore(database).coordinate(sys.argv[2]):
    print("holds it", flush=True)
    sys.stdin.readline()
"""


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def seen(database: Database, name: str) -> datetime | None:
    with database.begin() as connection:
        return connection.execute(select(study.c.seen_at).where(study.c.name == name)).scalar_one()


def alive(database: Database, name: str) -> bool:
    return read_snapshot(database, name).alive


def test_it_is_seen_until_it_leaves(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.02)
    name = new_study(database).name
    assert seen(database, name) is None
    with StudyStore(database).coordinate(name):
        first = seen(database, name)
        assert first is not None
        wait_until(lambda: seen(database, name) != first)
    last = seen(database, name)
    time.sleep(0.1)
    assert seen(database, name) == last


def test_the_pulse_takes_a_lost_lock_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.02)
    name = new_study(database).name
    with StudyStore(database).coordinate(name):
        terminate_connections(database)
        wait_until(lambda: alive(database, name))


def test_a_silent_one_is_dead_though_its_session_lives(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pooler keeps it, or a machine that stands still."""
    record = new_study(database)
    silent = StudyStore(database).coordinate(record.name)
    silent.__enter__()
    attempt = hand_out(silent, 0)
    assert alive(database, record.name)
    with pytest.raises(StudyError, match="another coordinator is running it"):
        StudyStore(database).coordinate(record.name).__enter__()
    _unseen(database, record.name)
    assert overview(read_snapshot(database, record.name)).play == "idle"
    assert StudyStore(database).require_idle(record.name).name == record.name
    assert study_page.show_idle(database, record.name, "from outside", {})
    with StudyStore(database).coordinate(record.name) as newer:
        assert alive(database, record.name)
        assert newer.slots()[0].state is SlotState.WAITING
        with pytest.raises((StudyError, TransientError)):
            finish(silent, 0, attempt, SlotState.COMPLETE, losses=[1.0])
        with pytest.raises(StudyError, match="another coordinator"):
            finish(silent, 0, attempt, SlotState.COMPLETE, losses=[1.0])
        finish(newer, 0, hand_out(newer, 0), SlotState.COMPLETE, losses=[2.0])
    silent.close()


def test_a_dead_ones_study_can_be_deleted(database: Database) -> None:
    name = new_study(database).name
    silent = StudyStore(database).coordinate(name)
    silent.__enter__()
    with pytest.raises(StudyError, match="is being run"):
        StudyStore(database).delete(name)
    _unseen(database, name)
    StudyStore(database).delete(name)
    silent.close()


def test_a_session_that_cannot_be_ended_is_named(database: Database, postgres_server: EmbeddedServer) -> None:
    """It belongs to another login."""
    name = new_study(database).name
    with database.begin() as connection:
        connection.execute(text("CREATE ROLE plain LOGIN"))
        connection.execute(text("GRANT ALL ON SCHEMA was, public TO plain"))
        connection.execute(text("GRANT ALL ON ALL TABLES IN SCHEMA was, public TO plain"))
    silent = StudyStore(database).coordinate(name)
    silent.__enter__()
    _unseen(database, name)
    url = parse_url(database.url).set(username="plain").render_as_string(hide_password=False)
    words = r"has not been seen for more than 60 s, but session \d+ .* keeps its lock.*pg_terminate_backend\(\d+\)"
    with Database.open(url) as other, pytest.raises(StudyError, match=words):
        StudyStore(other).coordinate(name).__enter__()
    silent.close()


def test_a_beat_that_fails_for_a_moment_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.001)
    beats: list[int] = []
    over = threading.Event()

    def beat() -> None:
        beats.append(len(beats))
        if len(beats) < 3:
            raise TransientError("not now")
        over.set()
        raise StudyError("never again")

    Pulse(beat).start()
    assert over.wait(30)
    time.sleep(0.05)
    assert beats == [0, 1, 2]


def _unseen(database: Database, name: str) -> None:
    """Nobody has seen its coordinator for longer than one may be silent."""
    with database.begin() as connection:
        query = text("UPDATE was.study SET seen_at = now() - make_interval(secs => :s) WHERE name = :name")
        connection.execute(query, {"s": coordinator_lock.SILENT_SECONDS + 1, "name": name})


@contextmanager
def killed(url: str, name: str) -> Iterator[None]:
    """A coordinator in another process, killed in the block's beginning."""
    path = ":".join(str(ROOT / part) for part in (".", "storage"))
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "holds it"
        process.kill()
    yield


def pooled(pooler: PgBouncer, database: Database) -> str:
    return pooler.url(str(parse_url(database.url).database))


@needs_pgbouncer
@pytest.mark.parametrize("reset", ["DISCARD ALL", ""])
def test_a_killed_one_behind_a_pooler(database: Database, postgres_server: EmbeddedServer, reset: str) -> None:
    """A pooler that resets sessions frees the study at once; one that does not keeps its lock, but not for ever."""
    name = new_study(database).name
    with pgbouncer(f"host={postgres_server.socket_folder}", server_reset_query=reset) as pooler:
        with killed(pooled(pooler, database), name):
            if reset:
                wait_until(lambda: not alive(database, name))
            else:
                assert alive(database, name)
                with pytest.raises(StudyError, match="another coordinator is running it"):
                    StudyStore(database).coordinate(name).__enter__()
                _unseen(database, name)
            assert not alive(database, name)
            with StudyStore(database).coordinate(name) as session:
                assert session.epoch == 2
        with Database.open(pooled(pooler, database)) as behind:
            with StudyStore(behind).coordinate(name):
                assert alive(database, name)
            assert not alive(database, name), "an orderly end gives the lock up by itself"


@needs_pgbouncer
def test_a_pooler_that_changes_its_mode_meanwhile(database: Database, postgres_server: EmbeddedServer) -> None:
    name = new_study(database).name
    with (
        pgbouncer(f"host={postgres_server.socket_folder}") as pooler,
        Database.open(pooled(pooler, database)) as behind,
        StudyStore(behind).coordinate(name) as session,
    ):
        hand_out(session, 0)
        _move(session)
        with pytest.raises(StorageError, match=r"pooler in transaction mode .* pool_mode = session"):
            hand_out(session, 1)


def _move(session: CoordinatorSession) -> None:
    """Its lock's statements run in another session from now on, as after a change of the mode."""
    session._fence._lock._process += 1
