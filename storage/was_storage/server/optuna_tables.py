"""Which schema of Optuna's tables was-search writes."""

from __future__ import annotations

from sqlalchemy import Connection, text

from was_search.errors import StorageError

REVISION = "v3.2.0.a"
"""Revision of Optuna's schema, as its Alembic table says it; the newest of Optuna 5.0."""

_REVISION = text("SELECT version_num FROM alembic_version")


def require_known(connection: Connection) -> None:
    """Refuse Optuna's tables where they are of another revision than the one that we write.

    Raises:
        StorageError: the revisions differ; the message names both.
    """
    found = ", ".join(connection.execute(_REVISION).scalars())
    if found != REVISION:
        raise StorageError(
            f"Optuna's tables in this database are of revision {found or 'unknown'}, was-search knows {REVISION}: "
            "install the Optuna that was-search asks for, or use another database"
        )
