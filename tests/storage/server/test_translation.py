"""Errors of the database as users meet them."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from was_search.errors import StorageError, TransientError
from was_storage.server.database import Database
from was_storage.server.translation import translate

pytestmark = pytest.mark.postgres


class _PgError(Exception):
    pgcode: str | None = None


def _as_sqlalchemy(message: str, code: str | None = None) -> OperationalError:
    original = _PgError(message)
    original.pgcode = code
    return OperationalError("SELECT 1", {}, original)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ('FATAL:  password authentication failed for user "u"', "user name or password is wrong"),
        ("fe_sendauth: no password supplied", "wants a password"),
        ('FATAL:  no pg_hba.conf entry for host "1.2.3.4"', "pg_hba.conf.*sslmode=require"),
        ("server does not support SSL, but SSL was required", "has no SSL"),
        ("SSL error: certificate verify failed", "not signed by an authority of sslrootcert"),
        ('invalid sslmode value: "yes"', "sslmode must be"),
        ("timeout expired", "does not answer"),
        ('FATAL:  "trust" authentication failed', "login was refused"),
        ("FATAL:  no such user: u", "the pooler does not know it"),
        ("FATAL:  no such database: d", "does not exist.*create it first"),
        ("FATAL:  unsupported startup parameter: geqo", "pooler in between.*PGOPTIONS"),
        ("Network is unreachable", "cannot be reached"),
    ],
)
def test_messages_at_connect_say_what_to_mend(message: str, words: str) -> None:
    error = translate(_as_sqlalchemy(message), "postgresql://u:***@h/d", opening=True)
    assert isinstance(error, StorageError)
    with pytest.raises(StorageError, match=words):
        raise error


@pytest.mark.parametrize(
    ("message", "code", "kind"),
    [
        ("the database system is starting up", None, TransientError),
        ("sorry, too many clients already", None, TransientError),
        ("no more connections allowed (max_client_conn)", None, TransientError),
        ("query_wait_timeout", "08P01", TransientError),
        ("pgbouncer cannot connect to server", "08P01", TransientError),
        ("server login has been failing, try again later (server_login_retry)", None, TransientError),
        ('too many connections for role "u"', "53300", TransientError),
        ("canceling statement due to statement timeout", "57014", TransientError),
        ("deadlock detected", "40P01", TransientError),
        ("terminating connection due to administrator command", "57P01", TransientError),
        ("server closed the connection unexpectedly", None, TransientError),
        ("could not extend file: No space left on device", "53100", StorageError),
        ("cannot execute INSERT in a read-only transaction", "25006", StorageError),
        ("relation was.study does not exist", "42P01", StorageError),
    ],
)
def test_errors_in_use_are_transient_or_wrong(message: str, code: str | None, kind: type[Exception]) -> None:
    assert isinstance(translate(_as_sqlalchemy(message, code), "postgresql://h/d"), kind)


def test_a_port_nobody_listens_on() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        url = f"postgresql://u:hidden@127.0.0.1:{port}/d"
        with pytest.raises(StorageError, match="no server listens there") as caught:
            Database.open(url)
    assert "hidden" not in str(caught.value)


def test_a_socket_folder_nobody_listens_in(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no server listens on that socket"):
        Database.open(f"postgresql://u@/d?host={tmp_path}")


def test_an_unknown_host() -> None:
    with pytest.raises(StorageError, match="the host is unknown"):
        Database.open("postgresql://u:hidden@host.invalid/d")


@contextmanager
def _answering(reply: bytes) -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1024)
                    connection.sendall(reply)

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b""])
def test_a_port_of_something_else(reply: bytes) -> None:
    with (
        _answering(reply) as port,
        pytest.raises(StorageError, match=r"not a Postgres server's|is that port a Postgres server's"),
    ):
        Database.open(f"postgresql://u@127.0.0.1:{port}/d")


def test_a_database_that_does_not_exist(postgres_url: str) -> None:
    url = make_url(postgres_url).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(StorageError, match=r"does not exist.*create it first"):
        Database.open(url)


def test_a_site_that_gives_long_statements_up(postgres_url: str) -> None:
    with (
        Database.open(postgres_url + "&options=-cstatement_timeout%3D500") as opened,
        pytest.raises(TransientError, match=r"gave a statement up .*raise statement_timeout"),
        opened.begin() as connection,
    ):
        connection.execute(text("SELECT pg_sleep(30)"))


def test_an_unknown_connection_argument(postgres_url: str) -> None:
    with pytest.raises(StorageError, match="not one that Postgres knows"):
        Database.open(postgres_url + "&ssl_mode=require")


def test_a_role_that_may_not_create(database: Database, postgres_url: str) -> None:
    role = f"guest_{uuid.uuid4().hex[:8]}"
    fresh = f"bare_{uuid.uuid4().hex[:8]}"
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(text(f"CREATE DATABASE {fresh}"))
    url = make_url(postgres_url).set(username=role, database=fresh).render_as_string(hide_password=False)
    with pytest.raises(StorageError, match="lacks a permission"):
        Database.open(url)


def _end_own_connection(connection: Connection, other: Database) -> None:
    pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
    with other.begin() as helper:
        helper.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    connection.execute(text("SELECT 1"))


def test_a_connection_lost_during_a_write_is_transient(database: Database) -> None:
    with pytest.raises(TransientError, match="connection was lost"), database.begin() as connection:
        _end_own_connection(connection, database)
    with database.begin() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
