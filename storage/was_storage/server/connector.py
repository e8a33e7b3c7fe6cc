"""Makes connections as libpq understands a URL, and settles each of them before it is used."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg2

from was_storage.server.sessions import require_session
from was_storage.server.urls import display_url, parameters

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PsycopgConnection

_KEPT_ALIVE = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3"}
_TIMEOUT_SECONDS = "10"

# A role called like our schema would otherwise have it before "public": Optuna would put its tables there. What the
# connection itself asks for ("client": options in the URL, or PGOPTIONS) wins.
_SETTLE = (
    "SELECT set_config('search_path', 'public', false) FROM pg_settings "
    "WHERE name = 'search_path' AND source <> 'client'"
)


class Connector:
    """Makes a new connection at every call; for SQLAlchemy's ``creator``. Thread-safe.

    What it sends at start-up is only what poolers take too (user, database, ``application_name``); all other settings
    are made on the connection. The first connection is checked for being a session.

    Args:
        url: a database URL.
        read_only: whether every transaction is a reading one.
        host: asked before each connection for the host to take instead of the URL's; None for the URL's.
    """

    def __init__(self, url: str, *, read_only: bool = False, host: Callable[[], str] | None = None) -> None:
        self._shown = display_url(url)
        self._arguments = _with_defaults(parameters(url))
        self._read_only = read_only
        self._host = host
        self._checked = False
        self._lock = threading.Lock()

    def __call__(self) -> PsycopgConnection:
        """A settled connection.

        Raises:
            psycopg2.Error: as the driver says it.
            StorageError: a pooler is in between that does not keep sessions; or what ``host`` raises.
        """
        connection = self._connect()
        try:
            connection.autocommit = True
            self._require_session(connection)
            connection.set_client_encoding("UTF8")
            with connection.cursor() as cursor:
                cursor.execute(_SETTLE)
            connection.autocommit = False
            if self._read_only:
                connection.readonly = True
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self) -> PsycopgConnection:
        arguments = self._arguments if self._host is None else {**self._arguments, "host": self._host()}
        return psycopg2.connect(**arguments)

    def _require_session(self, connection: PsycopgConnection) -> None:
        with self._lock:
            if not self._checked:
                require_session(connection, self._connect, self._shown)
                self._checked = True


def _with_defaults(given: dict[str, str]) -> dict[str, str]:
    """``given`` with our defaults where neither URL, service nor environment says it."""
    arguments = {"fallback_application_name": f"was-search {socket.gethostname()}:{os.getpid()}"[:63], **given}
    if "service" in given or "PGSERVICE" in os.environ:  # it may say the rest, and arguments would win over it
        return arguments
    if "PGCONNECT_TIMEOUT" not in os.environ:
        arguments.setdefault("connect_timeout", _TIMEOUT_SECONDS)
    return {**_KEPT_ALIVE, **arguments}
