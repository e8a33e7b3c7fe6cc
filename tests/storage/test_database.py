"""Opening, migrating, and living beside Optuna's tables."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
import pytest
from sqlalchemy import Connection, inspect, text

from was_search.control import Control, Wish
from was_search.errors import StorageError, TransientError
from was_storage import migrate as migrations
from was_storage.control import ControlStore
from was_storage.database import Database
from was_storage.embedded import EmbeddedServer
from was_storage.schema import HEAD, SCHEMA, metadata

pytestmark = pytest.mark.postgres


@pytest.fixture
def fresh_url(postgres_server: EmbeddedServer) -> str:
    return postgres_server.url(f"fresh_{uuid.uuid4().hex[:12]}")


def test_the_migrated_tables_are_those_of_the_schema(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.engine.connect() as connection:
        options = {
            "version_table_schema": SCHEMA,
            "include_schemas": True,
            "include_name": lambda name, kind, _: kind != "schema" or name == SCHEMA,
            "compare_server_default": False,
        }
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
        checks = inspect(connection).get_check_constraints("slot", SCHEMA)
    assert [check["name"] for check in checks] == ["slot_state"]


def test_head_is_the_newest_revision() -> None:
    from alembic.script import ScriptDirectory

    assert ScriptDirectory(str(migrations.MIGRATIONS)).get_current_head() == HEAD


def test_unknown_states_are_refused_by_the_database(database: Database) -> None:
    statement = text(
        "WITH made AS (INSERT INTO was.study VALUES (1, 's', 1, '{}', '{}', '{}') RETURNING id) "
        "INSERT INTO was.slot (study_id, number, state) SELECT id, 0, 'done' FROM made"
    )
    with pytest.raises(StorageError, match="slot_state"), database.begin() as connection:
        connection.execute(statement)


@pytest.mark.parametrize("optuna_first", [False, True])
def test_ours_and_optunas_migrations_accept_each_other(fresh_url: str, optuna_first: bool) -> None:
    if optuna_first:
        optuna.storages.RDBStorage(fresh_url).engine.dispose()
    for _ in range(2):
        with Database.open(fresh_url) as database:
            assert database.optuna_storage() is database.optuna_storage()
            with database.begin() as connection:
                assert migrations.revision(connection) == HEAD


def test_two_may_open_a_fresh_database_at_once(fresh_url: str) -> None:
    failures: list[BaseException] = []
    gate = threading.Barrier(4)

    def open_it() -> None:
        try:
            gate.wait()
            with Database.open(fresh_url) as database:
                database.optuna_storage()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_studies_from_before_there_was_control_have_one_row_of_it(fresh_url: str) -> None:
    with at_revision(fresh_url, "0002") as connection:
        for number, name in enumerate("st", 1):
            connection.execute(text(f"INSERT INTO was.study VALUES ({number}, '{name}', 1, '{{}}', '{{}}', '{{}}')"))
        connection.execute(text("INSERT INTO was.slot (study_id, number) VALUES (2, 0), (2, 1)"))
    with Database.open(fresh_url) as database:
        store = ControlStore(database)
        assert store.read("s") == Control(n_slots=0)
        assert store.read("t") == Control(n_slots=2)
        assert store.wish("t", Wish.PAUSE) is False
        assert store.read("t").wish is Wish.PAUSE


def test_losses_from_before_there_were_other_fitnesses_are_nll(fresh_url: str) -> None:
    with at_revision(fresh_url, "0001") as connection:
        connection.execute(text("INSERT INTO was.study VALUES (1, 's', 1, '{}', '{}', '{}')"))
        connection.execute(text("INSERT INTO was.slot (study_id, number, loss_nats) VALUES (1, 0, 2.5), (1, 1, NULL)"))
    with Database.open(fresh_url) as database, database.begin() as connection:
        assert migrations.revision(connection) == HEAD
        rows = connection.execute(text("SELECT loss_nats, nll_nats FROM was.slot ORDER BY number")).all()
    assert [tuple(row) for row in rows] == [(2.5, 2.5), (None, None)]


@contextmanager
def at_revision(url: str, revision: str) -> Iterator[Connection]:
    """A transaction on a database whose tables are those of ``revision``, as an older was-search made them."""
    from alembic import command
    from alembic.config import Config

    with Database.open(url) as database, database.begin() as connection:
        connection.execute(text("DROP SCHEMA was CASCADE"))
        connection.execute(text("CREATE SCHEMA was"))
        config = Config()
        config.set_main_option("script_location", str(migrations.MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        yield connection


def test_a_newer_schema_is_refused(fresh_url: str) -> None:
    with Database.open(fresh_url) as database, database.begin() as connection:
        connection.execute(text("UPDATE was.alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match=r"revision 9999, .* upgrade was-search"):
        Database.open(fresh_url)


def test_a_newer_optuna_schema_is_refused(fresh_url: str) -> None:
    with Database.open(fresh_url) as database:
        database.optuna_storage()
        with database.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = 'v99'"))
    with Database.open(fresh_url) as database, pytest.raises(StorageError, match="updating optuna"):
        database.optuna_storage()


def test_a_server_that_is_too_old_is_refused(fresh_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("was_storage.database.OLDEST_POSTGRES", 990000)
    with pytest.raises(StorageError, match="Postgres 99 or newer is needed, the server is 18"):
        Database.open(fresh_url)


def test_a_set_up_that_hangs_elsewhere_is_transient(fresh_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "SETUP_SECONDS", 0.1)
    with (
        Database.open(fresh_url) as opened,
        migrations.setup_lock(opened.engine),
        Database.open(fresh_url) as second,
        pytest.raises(TransientError, match="try again"),
    ):
        second.optuna_storage()


def test_the_urls_arguments_win_and_connections_are_named(fresh_url: str) -> None:
    query = text("SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()")
    with Database.open(fresh_url) as database, database.begin() as connection:
        assert str(connection.execute(query).scalar()).startswith("was-search ")
    with Database.open(fresh_url + "&application_name=mine") as database, database.begin() as connection:
        assert connection.execute(query).scalar() == "mine"


def test_urls_are_normal_and_shown_without_password(fresh_url: str) -> None:
    with Database.open(fresh_url.replace("postgres@", "postgres:hidden@")) as database:
        assert database.url.startswith("postgresql+psycopg2://")
        assert "hidden" not in database.display_url
