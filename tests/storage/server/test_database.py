"""Opening, migrating, and living beside Optuna's tables."""

from __future__ import annotations

import threading
import uuid

import optuna
import pytest
from sqlalchemy import inspect, text
from sqlalchemy.event import listen

from tests.doubles.small_study import new_study
from was_search.errors import StorageError, TransientError
from was_storage.server import migrate as migrations
from was_storage.server import optuna_tables
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer
from was_storage.server.schema import HEAD, SCHEMA, metadata

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


def test_opening_again_migrates_nothing(fresh_url: str) -> None:
    with Database.open(fresh_url) as database, database.begin() as connection:
        connection.execute(text("INSERT INTO was.study VALUES (1, 's', 1, '{}', '{}', '{}')"))
    statements: list[str] = []
    with Database.open(fresh_url) as database:
        listen(database.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        migrations.migrate(database.engine)
        with database.begin() as connection:
            assert connection.execute(text("SELECT name FROM was.study")).scalars().all() == ["s"]
    assert all(statement.startswith("SELECT") for statement in statements), statements


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


def test_an_optuna_whose_tables_we_do_not_write_is_refused(fresh_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was installed over the pinned release, and takes its own tables for right."""
    monkeypatch.setattr(optuna_tables, "REVISION", "v9.9.9")
    words = r"tables in this database are of revision v3\.\S+, was-search knows v9\.9\.9: install the Optuna"
    with Database.open(fresh_url) as database:
        for _ in range(2):
            with pytest.raises(StorageError, match=words):
                database.optuna_storage()
        with pytest.raises(StorageError, match=words):
            new_study(database)


def test_optunas_tables_are_those_that_we_write(database: Database) -> None:
    database.optuna_storage()
    with database.begin() as connection:
        optuna_tables.require_known(connection)


def test_a_server_that_is_too_old_is_refused(fresh_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("was_storage.server.database.OLDEST_POSTGRES", 990000)
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
