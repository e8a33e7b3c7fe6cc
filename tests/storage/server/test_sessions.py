"""A session of one's own or a place in a pool, told from connections' answers alone."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import psycopg2
import pytest

from was_search.errors import StorageError, TransientError
from was_storage.server.sessions import require_session


class Server:
    """Processes behind connections: each connection keeps one (``session``), or every statement takes the next."""

    def __init__(self, *processes: int, session: bool = False, newest_first: bool = True, direct: bool = False) -> None:
        self.idle = deque(processes)
        self.session, self.newest_first, self.direct = session or direct, newest_first, direct
        self.made = 0

    def connect(self) -> Any:
        return Connection(self)


class Connection:
    """What is used of psycopg2's."""

    def __init__(self, server: Server) -> None:
        if server.session and not server.idle:
            raise psycopg2.OperationalError("FATAL:  query_wait_timeout")
        self.server = server
        self.own = server.idle.popleft() if server.session else 0
        self.info = self
        self.backend_pid = self.own if server.direct else 99
        self.autocommit = True

    def cursor(self) -> Connection:
        return self

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def execute(self, query: str) -> None:
        assert query == "SELECT pg_backend_pid()"

    def fetchone(self) -> tuple[int]:
        if self.server.session:
            return (self.own,)
        process = self.server.idle.popleft()
        (self.server.idle.appendleft if self.server.newest_first else self.server.idle.append)(process)
        return (process,)

    def close(self) -> None:
        self.server.made += 1


def check(server: Server) -> None:
    require_session(cast(Any, server.connect()), cast(Any, server.connect), "postgresql://h/d")


def test_a_direct_connection_needs_no_second_one() -> None:
    server = Server(7, direct=True)
    check(server)
    assert server.made == 0


def test_a_pooler_that_keeps_sessions_passes() -> None:
    server = Server(7, 8, session=True)
    check(server)
    assert server.made == 1, "the second connection is closed"


@pytest.mark.parametrize("processes", [(7,), (7, 8), (7, 8, 9)])
@pytest.mark.parametrize("newest_first", [True, False])
def test_a_pooler_that_does_not_is_refused(processes: tuple[int, ...], newest_first: bool) -> None:
    with pytest.raises(StorageError, match=r"postgresql://h/d: a pooler in transaction mode .* pool_mode = session"):
        check(Server(*processes, newest_first=newest_first))


def test_a_pool_of_one_is_full() -> None:
    with pytest.raises((TransientError, psycopg2.OperationalError), match="query_wait_timeout"):
        check(Server(7, session=True))
