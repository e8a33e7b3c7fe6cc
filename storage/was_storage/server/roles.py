"""Least-privilege roles: one for those who run searches, one for those who only look."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sqlalchemy import Connection, text

from was_search.errors import ConfigError
from was_storage.server.database import Database
from was_storage.server.schema import SCHEMA, metadata

COORDINATOR = "was_search_coordinator"
READER = "was_search_reader"

_VERSIONS = (f"{SCHEMA}.alembic_version", "public.alembic_version")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


def init_roles(database: Database, coordinator: str = COORDINATOR, reader: str = READER) -> list[str]:
    """Make two roles that cannot log in, and give them what they need; returns the statements that were run.

    Logins get a role by ``GRANT ROLE TO LOGIN``. A coordinator reads and writes the rows of our tables and Optuna's,
    and can neither make nor change or drop a table: the database's owner does that, by running this again after an
    upgrade. A reader reads the same tables. Other tables of the database are not touched. Idempotent, in one
    transaction.

    Raises:
        ConfigError: a name that is not lower case letters, digits and ``_``, or the same one twice.
        StorageError: this login may not make roles, or does not own the tables.
    """
    for option, name in (("coordinator", coordinator), ("reader", reader)):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{option}: a role's name has lower case letters, digits and _, got {name!r}")
    if coordinator == reader:
        raise ConfigError(f"reader: must be another role than the coordinator's, got {reader!r} for both")
    database.optuna_storage()  # its tables must be there
    with database.begin() as connection:
        done = list(_statements(connection, coordinator, reader))
        for statement in done:
            connection.execute(text(statement))
    return done


def _statements(connection: Connection, coordinator: str, reader: str) -> Iterator[str]:
    there = set(connection.execute(text("SELECT rolname FROM pg_roles")).scalars())
    for role in (coordinator, reader):
        if role not in there:
            yield f"CREATE ROLE {role} NOLOGIN"
    both = f"{coordinator}, {reader}"
    name = connection.dialect.identifier_preparer.quote(
        str(connection.execute(text("SELECT current_database()")).scalar())
    )
    yield f"GRANT CONNECT ON DATABASE {name} TO {both}"
    yield f"GRANT USAGE ON SCHEMA {SCHEMA}, public TO {both}"
    rows = ", ".join([*(table.fullname for table in metadata.sorted_tables), *_optuna_tables()])
    yield f"GRANT SELECT ON {rows}, {', '.join(_VERSIONS)} TO {both}"
    yield f"GRANT INSERT, UPDATE, DELETE ON {rows} TO {coordinator}"
    sequences = connection.execute(
        text(
            "SELECT quote_ident(n.nspname) || '.' || quote_ident(s.relname) FROM pg_class s "
            "JOIN pg_namespace n ON n.oid = s.relnamespace "
            "JOIN pg_depend d ON d.objid = s.oid AND d.deptype IN ('a', 'i') "
            "WHERE s.relkind = 'S' AND d.refobjid = ANY(CAST(:tables AS regclass[])) ORDER BY 1"
        ),
        {"tables": [*(table.fullname for table in metadata.sorted_tables), *_optuna_tables()]},
    ).scalars()
    yield f"GRANT USAGE ON SEQUENCE {', '.join(sequences)} TO {coordinator}"


def _optuna_tables() -> list[str]:
    from optuna.storages._rdb.models import BaseModel

    return [f"public.{name}" for name in sorted(BaseModel.metadata.tables)]
