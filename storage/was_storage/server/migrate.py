"""Brings our schema to the newest revision; safe when several processes open the database at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from was_search.errors import StorageError
from was_storage.server.schema import HEAD, SCHEMA

MIGRATIONS = Path(__file__).parent / "migrations"
SETUP_LOCK = 0x77617300  # "was" and 0: the lock is held while tables are made, ours or Optuna's
SETUP_SECONDS = 60.0


@contextmanager
def setup_lock(engine: Engine) -> Iterator[Connection]:
    """A transaction that holds the database's set-up lock; waits up to a minute for another process's.

    The lock is Postgres' own advisory lock and ends with the transaction, also when the process dies.
    """
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = {round(SETUP_SECONDS * 1000)}"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SETUP_LOCK})
        yield connection


def migrate(engine: Engine) -> None:
    """Create or upgrade our schema in one transaction; idempotent, and one query when nothing is to be done.

    Raises:
        StorageError: the database was made by a newer was-search.
    """
    with engine.connect() as connection:
        current = revision(connection)
    if current == HEAD:
        return
    with setup_lock(engine) as connection:
        _upgrade(connection)


def revision(connection: Connection) -> str | None:
    """The schema's revision in the database, None before the first migration."""
    if connection.execute(text(f"SELECT to_regclass('{SCHEMA}.alembic_version')")).scalar() is None:
        return None
    value = connection.execute(text(f"SELECT version_num FROM {SCHEMA}.alembic_version")).scalar()
    return None if value is None else str(value)


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    current = revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise StorageError(
            f"the database's schema is revision {current}, this was-search knows up to {HEAD}: "
            "upgrade was-search, or use another database"
        )
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
