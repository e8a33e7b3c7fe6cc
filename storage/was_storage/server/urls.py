"""Database URLs: what libpq opens, in one canonical form; no password is ever shown."""

from __future__ import annotations

import os
import re

from psycopg2 import Error
from psycopg2.extensions import parse_dsn
from sqlalchemy.engine import URL

from was_search.errors import StorageError

DRIVER = "postgresql+psycopg2"
ACCEPTED = ("postgres", "postgresql", DRIVER)
_SHOWN = (
    *("host", "hostaddr", "port", "dbname", "user", "options", "application_name", "connect_timeout"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslnegotiation", "channel_binding", "gssencmode"),
    *("target_session_attrs", "load_balance_hosts", "passfile", "service", "keepalives"),
)
"""Arguments whose values are no secrets. All others are hidden, since a mistyped ``pasword`` holds one too."""

_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
_EXAMPLE = "expected postgresql://user:password@host:5432/database, or 'embedded'"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PLAIN_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*")
_UNKNOWN = ("invalid URI query parameter", "invalid connection option")
_ESCAPE = "write '@', '/', '?' and ':' inside the user name or password as %40, %2F, %3F and %3A in the URL"


def parse_url(url: str) -> URL:
    """``url`` as SQLAlchemy's URL with our driver; libpq reads it, so it means what it means to ``psql``.

    Several hosts, a socket's folder and whatever SQLAlchemy's URLs have no place for stand among its arguments. What
    the URL does not say, libpq takes from its service file (``?service=``) and its variables (``PGSSLMODE``,
    ``PGSERVICE``, ...). A ``~`` before the file of an argument is the home folder.

    Raises:
        StorageError: not a Postgres URL, or a part that cannot be read.
    """
    return _as_url(parameters(url))


def parameters(url: str) -> dict[str, str]:
    """``url`` as libpq's connection parameters, password included.

    Raises:
        StorageError: as :func:`parse_url`.
    """
    found = _read(url.strip())
    _check_places(found)
    for key in _FILES:
        if found.get(key, "").startswith("~"):
            found[key] = os.path.expanduser(found[key])
    return found


def normalise_url(url: str) -> str:
    """The one form of ``url`` that everything connects with, password included; idempotent.

    Accepts ``postgres://``, ``postgresql://`` and ``postgresql+psycopg2://`` before whatever libpq takes there, and
    libpq's ``host=... dbname=...``.

    Raises:
        StorageError: anything else; the message says what is accepted and never holds the password.
    """
    return _rendered(parse_url(url))


def display_url(url: str) -> str:
    """``url`` for people: its password, and the values of arguments that are not known to be harmless, are ``***``.

    Raises:
        StorageError: not a Postgres URL.
    """
    parsed = parse_url(url)
    hidden = {key: "***" for key in parsed.query if key not in _SHOWN}
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def _read(url: str) -> dict[str, str]:
    """libpq's own reading of a URL; none of its words are repeated, since they quote the URL."""
    if any(character < " " for character in url):
        raise StorageError(f"storage: the URL holds a control character; {_EXAMPLE}")
    scheme = _SCHEME.match(url)
    if scheme is None and "=" not in url:
        raise StorageError(f"storage: not a database URL; {_EXAMPLE}")
    if scheme is not None:
        if scheme[1] not in ACCEPTED:
            raise StorageError(f"storage: only Postgres is supported, got {scheme[1]!r}; {_EXAMPLE}")
        _check_delimiters(url[scheme.end() :])
        url = "postgresql://" + url[scheme.end() :]
    try:
        return dict(parse_dsn(url))
    except (Error, ValueError) as error:
        unknown = any(words in str(error) for words in _UNKNOWN)
    if scheme is None:
        raise StorageError(f"storage: not a database URL; {_EXAMPLE}")
    if unknown:
        raise StorageError("storage: an argument after '?' in the URL is not one that Postgres knows")
    raise StorageError(
        "storage: the URL cannot be read (is the port a number, and each '%' followed by two digits?); "
        f"{_ESCAPE}; {_EXAMPLE}"
    )


def _check_delimiters(rest: str) -> None:
    """Refuse an ``@`` that libpq would take for a database's name: a part of a password would be shown."""
    if "@" in rest.partition("?")[0].partition("/")[2]:
        raise StorageError(f"storage: {_ESCAPE}")


def _check_places(found: dict[str, str]) -> None:
    if any("@" in host[1:] for host in found.get("host", "").split(",")):  # one before a socket's name means abstract
        raise StorageError(f"storage: {_ESCAPE}")
    ports = found.get("port", "").split(",")
    if not all(port == "" or (port.isascii() and port.isdigit() and 0 < int(port) < 65536) for port in ports):
        raise StorageError(
            f"storage: the URL cannot be read (is the port a number from 1 to 65535?); {_ESCAPE}; {_EXAMPLE}"
        )


def _as_url(found: dict[str, str]) -> URL:
    query = dict(found)
    user, password, database = (query.pop(key, None) for key in ("user", "password", "dbname"))
    host = port = None
    if _PLAIN_HOST.fullmatch(found.get("host", "")) and "," not in found.get("port", ""):
        host = query.pop("host")
        port = int(query.pop("port", "") or 0) or None
    if user is None and password is not None:
        user = ""
    return URL.create(DRIVER, user, password, host, port, database, query)


def _rendered(url: URL) -> str:
    """As SQLAlchemy and libpq both read it: a blank is ``%20`` everywhere."""
    place, mark, query = url.render_as_string(hide_password=False).partition("?")
    return place.replace(" ", "%20") + mark + query.replace("+", "%20")
