"""Tells a session of one's own from a place in a pool of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from psycopg2 import Error

from was_search.errors import StorageError, TransientError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PsycopgConnection

_ROUNDS = 4


def require_session(connection: PsycopgConnection, another: Callable[[], PsycopgConnection], shown: str) -> None:
    """Refuse a connection whose statements run in several sessions, as behind a pooler in transaction mode.

    Locks, and settings made after connecting, last as long as a session. A server tells the number of its process when
    a connection begins and when asked; a pooler tells another one. Behind a pooler, two idle connections ask by turns:
    in session mode each gets its own number every time, else they share one or it changes.

    Args:
        connection: in autocommit.
        another: makes a second connection.
        shown: the database's URL for people.

    Raises:
        StorageError: statements do not stay in one session.
        TransientError: the pooler has no second connection.
    """
    first = process_of(connection)
    if first == connection.info.backend_pid:
        return
    asked = _asked_by_turns(connection, another, shown)
    ours, others = ({numbers[i] for numbers in asked} for i in (0, 1))
    if ours != {first} or len(others) != 1 or ours & others:
        raise no_session(shown)


def _asked_by_turns(
    connection: PsycopgConnection, another: Callable[[], PsycopgConnection], shown: str
) -> list[tuple[int, int]]:
    second = another()
    try:
        second.autocommit = True
        return [(process_of(connection), process_of(second)) for _ in range(_ROUNDS)]
    except Error as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise TransientError(
            f"database {shown} has no free connection: the pooler in between has no second one ({words[0]}); "
            "was-search uses up to ten: raise its default_pool_size, or try again"
        ) from error
    finally:
        second.close()


def no_session(shown: str) -> StorageError:
    """The refusal of a connection that is not one session."""
    return StorageError(
        f"database {shown}: a pooler in transaction mode is in between; was-search's locks last as long as a "
        "session: set pool_mode = session for this database or user, or give the server's own address"
    )


def process_of(connection: PsycopgConnection) -> int:
    """Number of the server's process that runs a statement now."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return int(cursor.fetchone()[0])
