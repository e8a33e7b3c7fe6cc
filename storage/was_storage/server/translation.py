"""The one seam where errors of the database, SQLAlchemy and Optuna become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, TimeoutError

from was_search.errors import StorageError, TransientError, WasError

_SERVICE = (
    "the service is not described as libpq reads it; check its name, and the file in PGSERVICEFILE, ~/.pg_service.conf "
    "or pg_service.conf in PGSYSCONFDIR"
)
# (part of the driver's message, what it means and what to do); the first that matches wins.
_AT_CONNECT = (
    ("password authentication failed", "the user name or password is wrong"),
    ("authentication failed", "the login was refused"),
    ("no such user", "the user name is wrong, or the pooler does not know it"),
    ("no password supplied", "the server wants a password and the URL has none"),
    (
        "no pg_hba.conf entry",
        "the server does not allow this user, database or address (pg_hba.conf); try ?sslmode=require",
    ),
    (
        "certificate verify failed",
        "the server's certificate is not signed by an authority of sslrootcert; give the CA that signed it",
    ),
    ("does not match host name", "the server's certificate is for another host; use the name that it is for"),
    ("root certificate file", "the file of sslrootcert (or PGSSLROOTCERT) cannot be read; give the CA's certificate"),
    (
        "private key file",
        "the file of sslkey (or PGSSLKEY) cannot be used; it must be there and readable by its owner only",
    ),
    ("certificate file", "the file of sslcert (or PGSSLCERT) cannot be read"),
    ("requires a valid client certificate", "the server asks for a certificate; give sslcert and sslkey"),
    ("service file", _SERVICE),
    ("definition of service", _SERVICE),
    ("could not translate host name", "the host is unknown; check its spelling in the URL"),
    ("connection refused", "no server listens there; start it, or check host and port"),
    (
        "no such file or directory",
        "no server listens on that socket; start it, or check the folder in ?host=",
    ),
    ("timeout expired", "the server, or the one behind a pooler, does not answer; check host, port and firewall"),
    ("network is unreachable", "the host cannot be reached from here"),
    ("no route to host", "the host cannot be reached from here"),
    ("does not support ssl", "the server has no SSL, but the URL asks for it; try ?sslmode=prefer"),
    ("certificate", "the server's certificate was not accepted; check sslmode and sslrootcert"),
    (
        "unsupported startup parameter",
        "a pooler in between does not take an argument of the URL or of PGOPTIONS; leave options out of both, "
        "or name it in the pooler's ignore_startup_parameters",
    ),
    ("invalid connection option", "an argument after '?' in the URL is not one that Postgres knows"),
    ("invalid sslmode", "sslmode must be disable, allow, prefer, require, verify-ca or verify-full"),
    ("invalid response to ssl negotiation", "that port is not a Postgres server's"),
    ("expected authentication request", "that port is not a Postgres server's"),
    (
        "server closed the connection unexpectedly",
        "the server hung up at once; is that port a Postgres server's?",
    ),
)
_FULL = (
    *("too many clients", "remaining connection slots", "too many connections for"),
    *("no more connections allowed", "query_wait_timeout"),
)
_POOLER_ALONE = ("pgbouncer cannot connect to server", "server login has been failing", "server login failed")
_RESTARTING = ("starting up", "shutting down", "recovery mode", "not yet accepting connections")
_LOST = (
    "server closed the connection",
    "connection has been closed",
    "connection already closed",
    "connection not open",
    "connection refused",
    "connection reset",
    "no connection to the server",
    "terminating connection",
    "could not receive data",
    "could not send data",
    "timeout expired",
    "no such file or directory",
    "cursor already closed",
)
_TRANSIENT_CODES = ("40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03", "57P05")
_BY_CODE = {
    "28": "the login was refused",
    "3D": "the database does not exist; create it first",
    "42501": "the database user lacks a permission; it needs CREATE on the database and on schema public",
    "25006": "the server is read-only (a standby?); use the primary",
    "3F": "was-search's tables are missing; open the database again to create them",
    "42P01": "was-search's tables are missing; open the database again to create them",
    "53100": "the server's disk is full",
}


@contextmanager
def translated(shown: str, *, opening: bool = False) -> Iterator[None]:
    """Raise database errors inside the block as ours, with the cause chained.

    Args:
        shown: the database's URL for people, without password.
        opening: whether the block makes the first connection: then a server that is down is for the user to
            mend (StorageError); later it is a restart that a retry mends (TransientError).

    Raises:
        StorageError: the database cannot be reached or refuses.
        TransientError: the connection was lost, the server restarts, a deadlock or a lock that was not free
            in time.
    """
    try:
        yield
    except WasError:
        raise
    except (SQLAlchemyError, StorageInternalError) as error:
        raise translate(error, shown, opening=opening) from error


def translate(error: BaseException, shown: str, *, opening: bool = False) -> WasError:
    """``error`` as a StorageError or TransientError; see :func:`translated`."""
    cause = _driver_error(error)
    if cause is None:
        if isinstance(error, TimeoutError):
            return TransientError(f"database {shown}: all connections are busy")
        return StorageError(f"database {shown}: {_first_line(error)}")
    code = getattr(cause.orig, "pgcode", None) or ""
    text = str(cause.orig).lower()
    detail = _first_line(cause.orig or cause)
    if any(part in text for part in _RESTARTING):
        return TransientError(f"database {shown} is restarting ({detail}); try again")
    if any(part in text for part in _POOLER_ALONE):
        return TransientError(f"database {shown}: the pooler cannot reach its Postgres ({detail}); try again")
    if not code and (("database" in text and "does not exist" in text) or "no such database" in text):
        return StorageError(f"database {shown} does not exist: {detail}; create it first")
    if any(part in text for part in _FULL):
        return TransientError(
            f"database {shown} has no free connection ({detail}); try again or raise max_connections "
            "(of a pooler: default_pool_size, max_client_conn)"
        )
    if code == "57014":
        return TransientError(
            f"database {shown}: the server gave a statement up ({detail}); if it comes again, raise statement_timeout "
            "of this login or database"
        )
    lost = code[:2] == "08" or (not code and any(part in text for part in _LOST))
    if code in _TRANSIENT_CODES or ((lost or cause.connection_invalidated) and not opening):
        return TransientError(f"database {shown}: the connection was lost or the server is busy ({detail}); try again")
    if not code or opening:
        for part, meaning in _AT_CONNECT:
            if part in text:
                return StorageError(f"cannot connect to {shown}: {meaning} ({detail})")
    meaning = _BY_CODE.get(code) or _BY_CODE.get(code[:2], "")
    return StorageError(f"database {shown}: {meaning + ' ' if meaning else ''}({detail})")


def _driver_error(error: BaseException | None) -> DBAPIError | None:
    """The driver's error in the chain of causes: Optuna wraps SQLAlchemy's."""
    while error is not None:
        if isinstance(error, DBAPIError):
            return error
        error = error.__cause__
    return None


def _first_line(error: BaseException) -> str:
    """The message's last word of the driver without its continuation lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
