"""Opens the database: the one way to reach Postgres, embedded or by URL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError

from was_search.errors import StorageError
from was_storage.server.connector import Connector
from was_storage.server.embedded import EmbeddedServer, default_home
from was_storage.server.migrate import migrate, setup_lock
from was_storage.server.optuna_tables import require_known
from was_storage.server.translation import translated
from was_storage.server.urls import DRIVER, display_url, normalise_url

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

EMBEDDED = "embedded"
OLDEST_POSTGRES = 120000
_NO_URL = f"{DRIVER}://"
"""What engines are made with: the connector knows where to connect, and no engine holds the password."""


class Database:
    """An open database with our tables at their newest revision.

    Ownership: whoever opens it closes it; closing ends its connections and its use of the embedded server.
    Objects made from it (stores, sessions, the Optuna storage) must not outlive it. Thread-safe. At most
    ten connections, usually two or three.
    """

    def __init__(
        self,
        url: str,
        server: EmbeddedServer | None = None,
        *,
        read_only: bool = False,
        host: Callable[[], str] | None = None,
    ) -> None:
        """Use :meth:`open`."""
        self._url = normalise_url(url)
        self._read_only = read_only
        self._server = server
        self._lock = threading.Lock()
        self._optuna: RDBStorage | None = None
        self._host = server.host if server is not None else host
        self._connector = Connector(self._url, read_only=read_only, host=self._host)
        self.engine: Engine = create_engine(_NO_URL, **_pool(self._connector))

    @classmethod
    def open(cls, storage: str = EMBEDDED, *, home: Path | None = None) -> Database:
        """Connect, and create or upgrade our tables; several processes may do so at once.

        Args:
            storage: a Postgres URL, or ``embedded`` for the server under ``home``.
            home: was-search's data folder; by default :func:`was_storage.server.embedded.default_home`.

        Raises:
            StorageError: not a Postgres URL; or the server cannot be reached, refuses the login, lacks the
                database or a permission, is too old, or holds a newer was-search's tables.
            TransientError: the server is just starting or stopping.
        """
        server = None
        if storage == EMBEDDED:
            server = EmbeddedServer.start((home or default_home()) / "postgres")
        try:
            database = cls(storage if server is None else server.url(), server)
        except BaseException:
            if server is not None:
                server.close()
            raise
        try:
            with database.translated(opening=True):
                _check_server(database.engine)
                migrate(database.engine)
        except BaseException:
            database.close()
            raise
        return database

    def read_only(self) -> Database:
        """The same database through connections that may only read; the caller closes it before this one.

        Optuna's tables are made first where they are missing.
        """
        self.optuna_storage()
        return Database(self._url, read_only=True, host=self._host)

    @property
    def url(self) -> str:
        """The normalised URL, password included: for connecting, never for showing."""
        return self._url

    @property
    def reads_only(self) -> bool:
        """Whether it was made by :meth:`read_only`."""
        return self._read_only

    @property
    def display_url(self) -> str:
        """The URL without password."""
        return display_url(self._url)

    def optuna_storage(self) -> RDBStorage:
        """Optuna's storage on the same database, made on first use and shared; missing tables are created.

        Raises:
            StorageError: Optuna's tables are of another version.
            TransientError: the connection was lost.
        """
        with self._lock:
            if self._optuna is None:
                self._optuna = self._open_optuna()
            return self._optuna

    def _open_optuna(self) -> RDBStorage:
        from optuna.storages import RDBStorage

        with self.translated(), setup_lock(self.engine):
            try:
                storage = RDBStorage(_NO_URL, engine_kwargs=_pool(self._connector))
            except RuntimeError as error:
                raise StorageError(f"database {self.display_url}: {error}") from error
            try:
                with self.engine.connect() as connection:
                    require_known(connection)
            except BaseException:
                _end(storage)
                raise
            return storage

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction: committed at the end, rolled back on an error, which is raised as ours."""
        with self.translated(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def translated(self, *, opening: bool = False) -> Iterator[None]:
        """Raise database errors inside the block as StorageError or TransientError."""
        with translated(self.display_url, opening=opening):
            yield

    def close(self) -> None:
        """End all connections, and the use of the embedded server. Idempotent."""
        with self._lock:
            optuna, self._optuna = self._optuna, None
        if optuna is not None:
            _end(optuna)
        self.engine.dispose()
        if self._server is not None:
            self._server.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a database holds its password, and is not pickled; workers need none")

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _pool(connector: Connector) -> dict[str, Any]:
    """Arguments of an engine: a small pool that notices dead connections."""
    return {"pool_size": 2, "max_overflow": 3, "pool_pre_ping": True, "creator": connector}


def _check_server(engine: Engine) -> None:
    with engine.connect() as connection:
        try:
            version = int(connection.execute(text("SHOW server_version_num")).scalar_one())
        except (DBAPIError, ValueError) as error:
            raise StorageError("the server speaks Postgres' protocol but is not Postgres") from error
        if version < OLDEST_POSTGRES:
            raise StorageError(
                f"Postgres {OLDEST_POSTGRES // 10000} or newer is needed, the server is {version // 10000}"
            )
