"""The lock that keeps a study to one coordinator: Postgres' advisory lock, on a connection of its own."""

from __future__ import annotations

import os
import socket
import time

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from was_search.errors import StudyError, TransientError
from was_storage.server.database import Database

COORDINATOR_LOCK = 0x77617301
"""First half of a coordinator's lock ("was" and 1); the study's id is the second."""

_PATIENCE_SECONDS = 1.0

_HOLDER = text(
    "SELECT a.application_name, to_char(a.backend_start, 'YYYY-MM-DD HH24:MI:SS TZ') AS since "
    "FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid "
    "WHERE l.locktype = 'advisory' AND l.granted AND l.classid = :key AND l.objid = :id "
    "AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
# The server must notice a coordinator whose machine vanished: by default it waits for hours.
_SETTINGS = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "idle_session_timeout": "0",
}


def held(connection: Connection, study_id: int) -> bool:
    """Whether a coordinator of the study is alive, as far as the database knows."""
    return connection.execute(_HOLDER, {"key": COORDINATOR_LOCK, "id": study_id}).first() is not None


class CoordinatorLock:
    """A study's lock, held from :meth:`acquire` to :meth:`release`, or until its connection is lost.

    It refuses a second coordinator while one is alive. It does not make writes safe (a restart of the
    database drops it): the epoch does. Not thread-safe.
    """

    def __init__(self, database: Database, study_id: int, name: str) -> None:
        self._database = database
        self._key = {"key": COORDINATOR_LOCK, "id": study_id}
        self._name = name
        self._connection: Connection | None = None

    def acquire(self) -> None:
        """Take the lock, waiting a moment for Postgres to notice that its last holder has died.

        Raises:
            StudyError: another coordinator holds it.
            TransientError: the connection was lost.
        """
        with self._database.translated():
            connection = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                label = f"was-search coordinator {socket.gethostname()}:{os.getpid()}"[:63]
                for name, value in {**_SETTINGS, "application_name": label}.items():
                    _set(connection, name, value)
                query = text("SELECT pg_try_advisory_lock(:key, :id)")
                deadline = time.monotonic() + _PATIENCE_SECONDS
                while not connection.execute(query, self._key).scalar():
                    if time.monotonic() > deadline:
                        raise self._refused(connection)
                    time.sleep(_PATIENCE_SECONDS / 10)
            except BaseException:
                connection.invalidate()  # its settings and locks must not return to the pool
                connection.close()
                raise
        self._connection = connection

    def renew(self) -> None:
        """Take the lock again where its connection was lost; one short query where it was not.

        Raises:
            StudyError: another coordinator holds it now.
            TransientError: the database is not back yet.
        """
        if self._connection is not None:
            try:
                with self._database.translated():
                    self._connection.execute(text("SELECT 1"))
                return
            except TransientError:
                self.release()
        self.acquire()

    def release(self) -> None:
        """Give the lock up by ending its connection. Idempotent; never raises."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.invalidate()
                connection.close()
            except DBAPIError:
                return

    def _refused(self, connection: Connection) -> StudyError:
        row = connection.execute(_HOLDER, self._key).first()
        holder = f" ({row.application_name}, connected since {row.since})" if row is not None else ""
        return StudyError(
            f"study {self._name!r}: another coordinator is running it{holder}; wait for it, or stop it. "
            "If its machine is gone, Postgres frees the study within about a minute"
        )


def _set(connection: Connection, name: str, value: str) -> None:
    """Change a setting of this connection, where the server has it."""
    query = text("SELECT set_config(name, :value, false) FROM pg_settings WHERE name = :name")
    connection.execute(query, {"name": name, "value": value})
