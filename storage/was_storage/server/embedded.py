"""An embedded real Postgres: started by its first user, stopped by its last, shared by all in between."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_data_dir
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from was_search.errors import StorageError
from was_search.process.file_lock import LockedFile
from was_search.process.signals import undisturbed
from was_storage.server import postgres_binaries
from was_storage.server.socket_folder import (
    HOME_VARIABLE,
    SOCKET_NAME,
    choose_socket_folder,
    remove_stale_locks,
    running_socket,
)
from was_storage.server.translation import translated
from was_storage.server.urls import DRIVER, display_url

DATABASE = "was"
WATCH_SECONDS = 2.0
"""Between two looks at whether the server is alive."""

_LAST_SECONDS = 5.0
_DUPLICATE_DATABASE = ("42P04", "23505")
_logger = logging.getLogger(__name__)


def default_home() -> Path:
    """``WAS_SEARCH_HOME``, else /var/lib/was-search for root, else the user's data folder.

    Raises:
        StorageError: the user has no home.
    """
    override = os.environ.get(HOME_VARIABLE)
    if override:
        return Path(override)
    if os.geteuid() == 0:
        return Path("/var/lib/was-search")
    try:
        found = Path(user_data_dir("was-search", appauthor=False))
    except RuntimeError as error:
        raise _homeless() from error
    if not found.is_absolute():  # an older platformdirs leaves "~" in it
        raise _homeless()
    return found


def _closed() -> StorageError:
    return StorageError("embedded Postgres: this use of the server is closed")


def _homeless() -> StorageError:
    return StorageError(
        f"embedded Postgres: user id {os.geteuid()} has no home folder and HOME is not set: "
        f"set {HOME_VARIABLE} to a folder for the data, or give a database URL"
    )


class EmbeddedServer:
    """One use of the Postgres server in a folder.

    Ownership: every :meth:`start` is one user and must be closed; interpreter exit closes what was left
    open. A process that dies is noticed by the locks it loses, so the next last user still stops the
    server. Several processes, and several uses in one, share the server. Threads may share a use; only its
    maker closes it.

    Three kinds of file locks lie beside the data folder: ``.lock`` orders starting and stopping,
    ``.users/`` holds one locked file a user, ``.running`` is locked by the server's own processes as long
    as one lives.
    """

    def __init__(self, folder: Path, socket_folder: Path, user: LockedFile) -> None:
        self.folder = folder
        self.socket_folder = socket_folder
        self._user: LockedFile | None = user
        self._pid = os.getpid()
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="embedded Postgres' watch", daemon=True).start()
        atexit.register(self.close)

    @classmethod
    def start(cls, folder: Path) -> EmbeddedServer:
        """Use the server whose data is in ``folder``; makes the folder and starts the server where needed.

        Args:
            folder: the data folder, made if missing (its parent too). As root it must not lie in a private
                folder.

        Raises:
            StorageError: the folder cannot be used, is private to root, belongs to another Postgres version
                or is in use on another machine; or the server does not start.
        """
        folder = _resolved(Path(folder))
        account = postgres_binaries.server_account()
        postgres_binaries.check_reachable(folder, account)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _guarded(folder):
                if not folder.exists():
                    postgres_binaries.initialise(folder, account)
                return cls._use(folder)
        except OSError as error:
            raise StorageError(
                f"embedded Postgres: {folder} cannot be used ({error.strerror or error}); "
                f"set {HOME_VARIABLE} to another folder"
            ) from error

    @classmethod
    def _use(cls, folder: Path) -> EmbeddedServer:
        for _ in _attempts(folder):
            with undisturbed():  # a signal between the server's start and the note of its user would leave it to nobody
                socket_folder = _start_or_find(folder)
                if socket_folder is not None:
                    return cls(folder, socket_folder, _new_user(folder))
        raise AssertionError("unreachable: the turns end with an error")

    def host(self) -> str:
        """The host of the next connection, which is the folder of the server's socket.

        A server that has died, as by an out-of-memory killer, is started again first, by whichever of its users asks
        or looks next; Postgres then recovers whatever was committed.

        Raises:
            StorageError: the use is closed, or the server does not start.
        """
        if self._user is None:
            raise _closed()
        if not LockedFile.held(_running_lock(self.folder)):
            self._start_again()
        return str(self.socket_folder)

    def _watch(self) -> None:
        """Others may need the server while this user does not."""
        while not self._closing.wait(WATCH_SECONDS):
            try:
                self.host()
            except (OSError, StorageError) as error:
                if not self._closing.is_set():
                    _logger.warning("embedded Postgres in %s has died: %s", self.folder, error)
                return

    def _start_again(self) -> None:
        began = time.monotonic()
        with _guarded(self.folder):
            if self._user is None:
                raise _closed()
            if LockedFile.held(_running_lock(self.folder)):  # another of its users was faster
                self.socket_folder = running_socket(self.folder) or self.socket_folder
                return
            for _ in _attempts(self.folder):
                with undisturbed():
                    socket_folder = _start_or_find(self.folder)
                if socket_folder is not None:
                    break
        assert socket_folder is not None
        self.socket_folder = socket_folder
        seconds = time.monotonic() - began
        _logger.warning("embedded Postgres in %s had died; it runs again after %.1f s", self.folder, seconds)

    def url(self, database: str = DATABASE) -> str:
        """Connection URL of ``database``, which is created if missing.

        Raises:
            StorageError: the server is closed or refuses.
        """
        if self._user is None:
            raise _closed()
        _create_database(self.socket_folder, database)
        return _url(self.socket_folder, database).render_as_string(hide_password=False)

    def close(self) -> None:
        """End this use; the last one stops the server, and no signal cuts that off. Idempotent; never fails."""
        if self._user is None or os.getpid() != self._pid:
            return
        self._closing.set()
        with undisturbed():
            user, self._user = self._user, None
            atexit.unregister(self.close)
            self._end(user)

    def _end(self, user: LockedFile) -> None:
        try:
            with _guarded(self.folder):
                user.remove()
                if not _live_users(self.folder):
                    _stop(self.folder)
                    if self.socket_folder != self.folder:
                        _remove(self.socket_folder)
        except (OSError, StorageError) as error:
            _logger.warning("embedded Postgres in %s was not stopped: %s", self.folder, error)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _resolved(folder: Path) -> Path:
    try:
        return folder.expanduser().resolve()
    except RuntimeError as error:  # "~", and no home
        raise _homeless() from error


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    lock = LockedFile.take(folder.with_name(folder.name + ".lock"), wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


def _attempts(folder: Path) -> Iterator[int]:
    """Turns to reach a server that may be about to start or to die, for a minute.

    Raises:
        StorageError: the minute is over.
    """
    deadline = time.monotonic() + postgres_binaries.START_SECONDS
    for turn in itertools.count():
        if time.monotonic() >= deadline:
            break
        yield turn
        time.sleep(0.1)
    raise StorageError(
        f"embedded Postgres in {folder} runs but cannot be reached from here: another machine or "
        f"container uses the folder. Give each its own {HOME_VARIABLE}, or share a Postgres by URL"
    )


def _running_lock(folder: Path) -> Path:
    return folder.with_name(folder.name + ".running")


def _stop(folder: Path) -> None:
    """Stop the server; one that has died already, or dies meanwhile, is stopped."""
    running = _running_lock(folder)
    if not LockedFile.held(running):
        return
    try:
        postgres_binaries.stop(folder, postgres_binaries.server_account())
    except StorageError:
        deadline = time.monotonic() + _LAST_SECONDS
        while LockedFile.held(running):  # the sessions of a server that was killed end a moment after it
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _remove(socket_folder: Path) -> None:
    """Remove a temporary folder; a server that was killed has left its socket there."""
    for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
        (socket_folder / name).unlink(missing_ok=True)
    socket_folder.rmdir()


def _users_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".users")


def _new_user(folder: Path) -> LockedFile:
    users = _users_folder(folder)
    users.mkdir(exist_ok=True)
    user = LockedFile.take(users / f"{os.getpid()}-{uuid.uuid4().hex[:8]}")
    assert user is not None
    return user


def _live_users(folder: Path) -> bool:
    alive = False
    for path in sorted(_users_folder(folder).glob("*")):
        stale = LockedFile.take(path)
        if stale is None:
            alive = True
        else:
            stale.remove()
    return alive


def _start_or_find(folder: Path) -> Path | None:
    """Start the server unless it runs; returns its socket's folder, None while one that runs does not answer."""
    running = LockedFile.take(_running_lock(folder))
    if running is not None:
        try:
            return _start(folder, running)
        finally:
            running.close()
    socket_folder = running_socket(folder)
    return socket_folder if socket_folder is not None and _answers(socket_folder) else None


def _start(folder: Path, running: LockedFile) -> Path:
    account = postgres_binaries.server_account()
    socket_folder = choose_socket_folder(folder)
    remove_stale_locks(folder, socket_folder)
    if socket_folder != folder:
        postgres_binaries.hand_over(socket_folder, account)
    postgres_binaries.start(folder, socket_folder, account, running.fd)
    return socket_folder


def _url(socket_folder: Path, database: str) -> URL:
    query = {"host": str(socket_folder)}
    return URL.create(DRIVER, username=postgres_binaries.SUPERUSER, database=database, query=query)


def _answers(socket_folder: Path) -> bool:
    engine = create_engine(_url(socket_folder, "postgres"), poolclass=NullPool, connect_args={"connect_timeout": 5})
    try:
        with engine.connect():
            return True
    except OperationalError:
        return False


def _create_database(socket_folder: Path, database: str) -> None:
    url = _url(socket_folder, "postgres")
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    shown = display_url(url.render_as_string())
    with translated(shown, opening=True), engine.connect() as connection:
        known = connection.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": database})
        if known.scalar() is not None:
            return
        quoted = database.replace('"', '""')
        try:
            connection.execute(text(f'CREATE DATABASE "{quoted}"'.replace(":", "\\:")))
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) not in _DUPLICATE_DATABASE:  # else another process was faster
                raise
