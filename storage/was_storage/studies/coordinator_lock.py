"""The lock that keeps a study to one coordinator: Postgres' advisory lock, on a connection of its own."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from was_search.errors import StudyError, TransientError
from was_storage.server.database import Database
from was_storage.server.sessions import no_session

COORDINATOR_LOCK = 0x77617301
"""First half of a coordinator's lock ("was" and 1); the study's id is the second."""

SILENT_SECONDS = 60.0
"""A coordinator that has not been seen for so long is dead: a pooler may keep the session that holds its lock."""

_PATIENCE_SECONDS = 1.0

_HOLDER = (
    "SELECT l.pid, a.application_name, to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS since, a.state, "
    "coalesce(clock_timestamp() - s.seen_at > make_interval(secs => :silent), false) AS silent "
    "FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid LEFT JOIN was.study s ON s.id = :id "
    "WHERE l.locktype = 'advisory' AND l.granted AND l.classid = :key AND l.objid = :id "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_END_SILENT = f"SELECT pg_terminate_backend(pid) FROM ({_HOLDER}) holder WHERE silent AND state = 'idle'"
# The server must notice a coordinator whose machine vanished: by default it waits for hours.
_SETTINGS = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "idle_session_timeout": "0",
}


def held(connection: Connection, study_id: int) -> bool:
    """Whether a coordinator of the study is alive, as far as the database knows."""
    holder = connection.execute(text(_HOLDER), _of(study_id)).first()
    return holder is not None and not holder.silent


def free(connection: Connection, study_id: int) -> bool:
    """Whether no coordinator of the study is alive; if so, none takes the lock before the transaction ends."""
    query = text("SELECT pg_try_advisory_xact_lock(:key, :id)")
    return bool(connection.execute(query, _of(study_id)).scalar()) or not held(connection, study_id)


def _of(study_id: int) -> dict[str, float]:
    return {"key": COORDINATOR_LOCK, "id": study_id, "silent": SILENT_SECONDS}


class CoordinatorLock:
    """A study's lock, held from :meth:`acquire` to :meth:`release`, or until its connection is lost.

    It refuses a second coordinator while one is alive. It does not make writes safe (a restart of the
    database drops it): the epoch does. Not thread-safe.
    """

    def __init__(self, database: Database, study_id: int, name: str) -> None:
        self._database = database
        self._study_id = study_id
        self._name = name
        self._connection: Connection | None = None
        self._process = 0

    def acquire(self) -> None:
        """Take the lock, waiting a moment for Postgres to notice that its last holder has died.

        A session that holds it for a coordinator that is not seen any more, as a pooler's may, is ended.

        Raises:
            StudyError: another coordinator holds it.
            StorageError: the connection is not one session.
            TransientError: the connection was lost.
        """
        with self._database.translated():
            connection = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                label = f"was-search coordinator {socket.gethostname()}:{os.getpid()}"[:63]
                for name, value in {**_SETTINGS, "application_name": label}.items():
                    _set(connection, name, value)
                self._take(connection)
                connection.execute(text("UPDATE was.study SET seen_at = now() WHERE id = :id"), {"id": self._study_id})
                self._process = self._own_process(connection)
            except BaseException:
                connection.invalidate()  # its settings and locks must not return to the pool
                connection.close()
                raise
        self._connection = connection

    def renew(self) -> None:
        """Take the lock again where its connection was lost; one short query where it was not.

        Raises:
            StudyError: another coordinator holds it now.
            StorageError: a pooler runs statements in other sessions by now.
            TransientError: the database is not back yet.
        """
        if self._connection is not None:
            try:
                with self._database.translated():
                    process = self._connection.execute(text("SELECT pg_backend_pid()")).scalar()
                if process != self._process:
                    raise no_session(self._database.display_url)
                return
            except TransientError:
                self._drop()
        self.acquire()

    def release(self) -> None:
        """Give the lock up, and end its connection. Idempotent; never raises."""
        if self._connection is not None and not self._connection.invalidated:
            with suppress(DBAPIError):  # a pooler may keep the session
                self._connection.execute(text("SELECT pg_advisory_unlock_all()"))
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(DBAPIError):
                connection.invalidate()
                connection.close()

    def _take(self, connection: Connection) -> None:
        query = text("SELECT pg_try_advisory_lock(:key, :id)")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not connection.execute(query, _of(self._study_id)).scalar():
            if time.monotonic() > deadline:
                raise self._refused(connection)
            with suppress(ProgrammingError):  # the session is another login's
                connection.execute(text(_END_SILENT), _of(self._study_id))
            time.sleep(_PATIENCE_SECONDS / 10)

    def _own_process(self, connection: Connection) -> int:
        """The process that the server runs this connection's statements in, which is the lock's holder."""
        holder = connection.execute(text(_HOLDER), _of(self._study_id)).first()
        process = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        if holder is None or holder.pid != process:
            raise no_session(self._database.display_url)
        return int(process)

    def _refused(self, connection: Connection) -> StudyError:
        row = connection.execute(text(_HOLDER), _of(self._study_id)).first()
        holder = f" ({row.application_name}, connected since {row.since})" if row is not None else ""
        if row is not None and row.silent:
            return StudyError(
                f"study {self._name!r}: its coordinator has not been seen for more than {SILENT_SECONDS:.0f} s, but "
                f"session {row.pid} of the server keeps its lock{holder}; as its login or a superuser: "
                f"SELECT pg_terminate_backend({row.pid})"
            )
        return StudyError(
            f"study {self._name!r}: another coordinator is running it{holder}; wait for it, or stop it. "
            "If its machine is gone, the study is free within about a minute"
        )


def _set(connection: Connection, name: str, value: str) -> None:
    """Change a setting of this connection, where the server has it."""
    query = text("SELECT set_config(name, :value, false) FROM pg_settings WHERE name = :name")
    connection.execute(query, {"name": name, "value": value})
