"""Database URLs: every accepted form becomes ``postgresql+psycopg2://``, and no password is ever shown."""

from __future__ import annotations

import os

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from was_search.errors import StorageError

DRIVER = "postgresql+psycopg2"
ACCEPTED = ("postgres", "postgresql", DRIVER)
_SHOWN = (
    *("host", "hostaddr", "port", "dbname", "user", "options", "application_name", "connect_timeout"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslnegotiation", "channel_binding", "gssencmode"),
    *("target_session_attrs", "passfile", "service", "keepalives"),
)
"""Arguments whose values are no secrets. All others are hidden, since a mistyped ``pasword`` holds one too."""

_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
_EXAMPLE = "expected postgresql://user:password@host:5432/database, or 'embedded'"


def parse_url(url: str) -> URL:
    """``url`` as SQLAlchemy's URL with our driver; connection arguments (``?sslmode=verify-full``) pass through.

    What the URL does not say, libpq takes from its own variables (``PGSSLMODE``, ``PGSSLROOTCERT``, ...). A ``~``
    before the file of an argument is the home folder.

    Raises:
        StorageError: not a Postgres URL, or a part that cannot be read.
    """
    scheme, separator, _ = url.strip().partition("://")
    if not separator:
        raise StorageError(f"storage: not a database URL; {_EXAMPLE}")
    if scheme not in ACCEPTED:
        raise StorageError(f"storage: only Postgres is supported, got {scheme!r}; {_EXAMPLE}")
    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError):
        # The cause's message may quote the URL, password included.
        raise StorageError(f"storage: the URL cannot be read (is the port a number?); {_EXAMPLE}") from None
    if "@" in (parsed.host or ""):
        raise StorageError("storage: write '@' inside the user name or password as %40 in the URL")
    files = {
        key: os.path.expanduser(value)
        for key, value in parsed.query.items()
        if key in _FILES and isinstance(value, str) and value.startswith("~")
    }
    return parsed.set(drivername=DRIVER).update_query_dict(files)


def normalise_url(url: str) -> str:
    """The one form of ``url`` that everything connects with, password included; idempotent.

    Accepts ``postgres://``, ``postgresql://``, ``postgresql+psycopg2://`` and socket URLs
    (``?host=/folder``).

    Raises:
        StorageError: anything else; the message says what is accepted and never holds the password.
    """
    return parse_url(url).render_as_string(hide_password=False)


def display_url(url: str) -> str:
    """``url`` for people: its password, and the values of arguments that are not known to be harmless, are ``***``.

    Raises:
        StorageError: not a Postgres URL.
    """
    parsed = parse_url(url)
    hidden = {key: "***" for key in parsed.query if key not in _SHOWN}
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")
