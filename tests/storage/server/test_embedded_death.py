"""The embedded server is killed while it is used: whoever needs it next starts it again, and nothing is lost."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg2
import pytest
from sqlalchemy import text

from tests.doubles.small_study import assert_one_to_one, finish, hand_out, new_study
from tests.servers.postgres import spare_the_disk
from was_search.coordinator.durable import durable
from was_search.errors import StorageError, TransientError
from was_search.process.file_lock import LockedFile
from was_search.studies.slots import SlotState
from was_storage.server import embedded, postgres_binaries
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer
from was_storage.server.socket_folder import remove_stale_locks
from was_storage.server.urls import parameters
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


N_SLOTS = 60
PAUSES = (0.05, 0.21)
"""Seconds before each kill of the server under a coordinator that writes all the time."""


@pytest.fixture(scope="module")
def home(server_home: Path) -> Path:
    """With a server whose recovery does not wait for the disk."""
    home = server_home / "killed"
    with EmbeddedServer.start(home / "postgres") as server:
        spare_the_disk(server, killed=True)
    return home


def postmaster(folder: Path) -> psutil.Process:
    """Of the server, once it has said so: whoever looks for it every two seconds may be starting it again."""
    end = time.monotonic() + 60
    while True:
        with suppress(FileNotFoundError, IndexError, psutil.NoSuchProcess):
            return psutil.Process(int((folder / "postmaster.pid").read_text().splitlines()[0]))
        assert time.monotonic() < end, f"no server runs in {folder}"
        time.sleep(0.01)


def kill_postmaster(folder: Path) -> None:
    """As an out-of-memory killer does; its sessions notice and end."""
    process = postmaster(folder)
    process.kill()
    psutil.wait_procs([process], timeout=30)


def kill_all(folder: Path) -> None:
    end_all(postmaster(folder))


def end_all(process: psutil.Process) -> None:
    processes = [process, *process.children(recursive=True)]
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    assert not psutil.wait_procs(processes, timeout=30)[1]


def kill_a_session(folder: Path) -> None:
    """Postgres ends all others then, and recovers by itself."""
    sessions = [each for each in postmaster(folder).children() if "[local]" in " ".join(each.cmdline())]
    sessions[0].kill()


def kill_and_forget(folder: Path) -> None:
    """No note of its process is left either, nor its socket: they go first, later they may be the next one's."""
    process = postmaster(folder)
    for name in ("postmaster.pid", ".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
        (folder / name).unlink(missing_ok=True)
    end_all(process)


def stop_it(folder: Path) -> None:
    """Somebody else ends it in an orderly way."""
    postgres_binaries.stop(folder, postgres_binaries.server_account())


DEATHS: list[Callable[[Path], None]] = [kill_postmaster, kill_all, kill_a_session, kill_and_forget, stop_it]


def until_it_answers(act: Callable[[], object]) -> float:
    began = time.monotonic()
    while True:
        try:
            act()
            return time.monotonic() - began
        except TransientError:
            assert time.monotonic() - began < 60.0
            time.sleep(0.1)


@pytest.mark.parametrize("death", DEATHS)
def test_its_user_starts_it_again(home: Path, death: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    folder = home / "postgres"
    with Database.open("embedded", home=home) as database:
        with database.read_only() as reading:
            name = new_study(database, 3).name
            death(folder)
            seconds = until_it_answers(lambda: StudyStore(database).get(name))
            until_it_answers(lambda: StudyStore(reading).get(name))
        print(f"{death.__name__}: {seconds:.1f} s")
        with database.begin() as connection:
            assert connection.execute(text("SELECT count(*) FROM was.slot")).scalar_one() >= 3
    assert not LockedFile.held(home / "postgres.running")
    assert "was not stopped" not in caplog.text
    assert ("had died; it runs again" in caplog.text) is (death is not kill_a_session)


def strike(folder: Path, database: Database) -> None:
    for pause in PAUSES:
        time.sleep(pause)
        kill_postmaster(folder)
        print(f"struck: {until_it_answers(lambda: StudyStore(database).list()):.1f} s")


def test_nothing_that_was_written_is_lost(home: Path) -> None:
    """A coordinator writes all the time; the server is killed in between, each time at another moment."""
    folder = home / "postgres"
    with Database.open("embedded", home=home) as database:
        name = new_study(database, N_SLOTS).name
        with StudyStore(database).coordinate(name) as session:
            store = durable(session)
            killer = threading.Thread(target=strike, args=(folder, database))
            killer.start()
            for number in range(N_SLOTS):
                attempt = hand_out(store, number)
                assert finish(store, number, attempt, SlotState.COMPLETE, losses=[float(number)])
                if number > N_SLOTS // 2:
                    killer.join()
            done = [slot.loss_nats for slot in session.slots() if slot.state is SlotState.COMPLETE]
            assert done == [float(number) for number in range(N_SLOTS)]
            assert_one_to_one(database, session)


def test_the_last_user_of_a_dead_server_has_nothing_to_stop(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    for death in (kill_postmaster, kill_all):
        with Database.open("embedded", home=home):
            death(home / "postgres")
    assert "was not stopped" not in caplog.text
    assert not LockedFile.held(home / "postgres.running")


def test_a_dead_server_leaves_no_temporary_socket(server_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = server_home / ("far " * 25) / "postgres"
    with EmbeddedServer.start(folder) as server:
        spare_the_disk(server, killed=True)
        kill_all(folder)
        assert server.host() == str(server.socket_folder)
        kill_all(folder)
    assert not server.socket_folder.exists()
    assert "was not stopped" not in caplog.text


def test_it_comes_back_though_nobody_here_needs_it(home: Path) -> None:
    """A run computes for minutes; whoever looks with psql meanwhile finds the server."""
    with Database.open("embedded", home=home) as database:
        arguments = parameters(database.url)
        kill_postmaster(home / "postgres")

        def look() -> None:
            try:
                psycopg2.connect(**arguments).close()
            except psycopg2.OperationalError as error:
                raise TransientError(str(error)) from error

        print(f"back after {until_it_answers(look):.1f} s")


def test_two_who_need_it_at_once_start_one(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Database.open("embedded", home=home) as first, Database.open("embedded", home=home) as second:
        kill_all(home / "postgres")
        threads = [
            threading.Thread(target=until_it_answers, args=(lambda d=each: StudyStore(d).list(),))
            for each in (first, second, first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert postmaster(home / "postgres").is_running()
    assert caplog.text.count("had died; it runs again") <= 2
    with pytest.raises(StorageError, match="this use of the server is closed"):
        first._server.host()  # type: ignore[union-attr]


def test_a_server_that_cannot_start_again_says_why(server_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = server_home / "ruined"
    monkeypatch.setattr(embedded, "WATCH_SECONDS", 3600.0)
    with Database.open("embedded", home=home) as database:
        kill_all(home / "postgres")
        (home / "postgres" / "global" / "pg_control").unlink()
        with pytest.raises(StorageError, match=r"did not start: .*pg_control"):
            StudyStore(database).list()


def waiting_in(folder: Path, program: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([str(program), "60"], cwd=folder)
    while Path(f"/proc/{process.pid}/comm").read_text() != "postgres\n":
        time.sleep(0.01)
    return process


def test_a_number_that_something_else_has_now_is_forgotten(server_home: Path, tmp_path: Path) -> None:
    """Another Postgres, as in a container, where numbers are small; or a dead process that nobody has waited for."""
    program, folder = tmp_path / "postgres", server_home / "numbered"
    program.symlink_to("/bin/sleep")
    folder.mkdir()
    elsewhere, here = waiting_in(Path("/"), program), waiting_in(folder, program)
    dead = waiting_in(folder, program)
    dead.kill()
    while "Z" not in Path(f"/proc/{dead.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    notes = [folder / "postmaster.pid", folder / ".s.PGSQL.5432.lock"]
    try:
        for process, left in ((elsewhere, []), (dead, []), (here, notes)):
            for note in notes:
                note.write_text(f"{process.pid}\n{folder}\n")
            remove_stale_locks(folder, folder)
            assert [note for note in notes if note.exists()] == left
    finally:
        for process in (elsewhere, here, dead):
            process.kill()
            process.wait()
