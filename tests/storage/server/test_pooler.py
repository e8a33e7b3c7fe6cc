"""Behind a real PgBouncer, in its modes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from tests.places.pgbouncer import PgBouncer, needs_pgbouncer, pgbouncer
from was_search.errors import StorageError, TransientError
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer

pytestmark = [pytest.mark.postgres, needs_pgbouncer]


@pytest.fixture
def name(postgres_server: EmbeddedServer) -> str:
    """A fresh database."""
    fresh = f"pooled_{uuid.uuid4().hex[:12]}"
    postgres_server.url(fresh)
    return fresh


@pytest.fixture(scope="module")
def server(postgres_server: EmbeddedServer) -> str:
    return f"host={postgres_server.socket_folder}"


@pytest.fixture(scope="module")
def in_sessions(server: str) -> Iterator[PgBouncer]:
    """As it is installed: session mode, which refuses the startup parameter "options"."""
    with pgbouncer(server) as pooler:
        yield pooler


def value(database: Database, query: str) -> object:
    with database.begin() as connection:
        found = connection.execute(text(query))
        return found.scalar() if found.returns_rows else None


def test_the_default_mode_opens(in_sessions: PgBouncer, name: str) -> None:
    with Database.open(in_sessions.url(name)) as database:
        database.optuna_storage()
        assert value(database, "SHOW search_path") == "public"
        assert str(value(database, "SHOW application_name")).startswith("was-search ")
        with database.read_only() as reading:
            assert value(reading, "SELECT count(*) FROM was.study") == 0
            with pytest.raises(StorageError, match="read-only"):
                value(reading, "DELETE FROM was.study")
            with pytest.raises(StorageError, match="read-only"), reading.translated():
                reading.optuna_storage().create_new_study([])
        value(database, "DELETE FROM was.study")  # what the reading ones were told is not left to others


def test_options_of_the_url_are_refused_with_the_remedy(
    in_sessions: PgBouncer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"pooler in between does not take .*PGOPTIONS; leave options out.*ignore_startup_parameters"
    with pytest.raises(StorageError, match=words):
        Database.open(in_sessions.url(name) + "?options=-cwork_mem%3D8MB")
    monkeypatch.setenv("PGOPTIONS", "-cwork_mem=8MB")
    with pytest.raises(StorageError, match=words):
        Database.open(in_sessions.url(name))


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("fair", ["0", "1"])
def test_other_modes_are_refused(server: str, name: str, mode: str, fair: str) -> None:
    with (
        pgbouncer(server, pool_mode=mode, server_round_robin=fair, min_pool_size="3") as pooler,
        pytest.raises(StorageError, match=r"pooler in transaction mode .* pool_mode = session .*own address"),
    ):
        Database.open(pooler.url(name))


def test_a_pool_without_a_free_place(server: str, name: str) -> None:
    with (
        pgbouncer(server, default_pool_size="1", query_wait_timeout="1") as pooler,
        pytest.raises(TransientError, match=r"no free connection.*default_pool_size"),
    ):
        Database.open(pooler.url(name))


def test_no_place_for_another_client(server: str, name: str) -> None:
    with (
        pgbouncer(server, max_client_conn="1") as pooler,
        pytest.raises(TransientError, match=r"no free connection.*max_client_conn"),
    ):
        Database.open(pooler.url(name))


def test_words_of_the_pooler(in_sessions: PgBouncer) -> None:
    with pytest.raises(StorageError, match=r"does not exist.*create it first"):
        Database.open(in_sessions.url("nowhere"))
    with pytest.raises(StorageError, match="login was refused"):
        Database.open(in_sessions.url("x").replace("postgres@", "nobody@"))
