"""Roles on a real server: what a coordinator and a reader can do, and what they cannot."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np
import optuna
import pytest
from sqlalchemy import make_url, text

from tests.doubles.small_study import assert_one_to_one, finish, hand_out, new_study
from was_search.errors import ConfigError, StorageError
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.server.roles import init_roles
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def names() -> tuple[str, str]:
    """Roles belong to the whole server: names of this module's own."""
    end = uuid.uuid4().hex[:8]
    return f"coordinator_{end}", f"reader_{end}"


@pytest.fixture(scope="module")
def logins(database: Database, names: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """URLs of a login with each role."""
    init_roles(database, *names)
    urls = []
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE public.others (x int)"))
        for role in names:
            connection.execute(text(f"CREATE ROLE login_{role} LOGIN PASSWORD 'x' IN ROLE {role}"))
            url = make_url(database.url).set(username=f"login_{role}", password="x")
            urls.append(url.render_as_string(hide_password=False))
    yield urls[0], urls[1]
    with database.begin() as connection:
        for role in names:
            connection.execute(text(f"DROP ROLE login_{role}"))
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


def refused(database: Database, statement: str) -> None:
    with pytest.raises(StorageError, match=r"permission denied|must be owner"), database.begin() as connection:
        connection.execute(text(statement))


def test_a_coordinator_runs_a_study_and_changes_no_table(database: Database, logins: tuple[str, str]) -> None:
    with Database.open(logins[0]) as mine:
        record = new_study(mine, 2)
        with StudyStore(mine).coordinate(record.name) as session:
            for number in range(2):
                attempt = hand_out(session, number, "worker")
                finish(session, number, attempt, SlotState.COMPLETE, losses=np.array([2.0]), worker="worker")
            assert_one_to_one(mine, session)
        for statement in (
            "DROP TABLE was.slot CASCADE",
            "ALTER TABLE was.study ADD COLUMN more int",
            "CREATE TABLE was.mine (x int)",
            "TRUNCATE was.slot",
            "UPDATE was.alembic_version SET version_num = '9'",
            "SELECT * FROM public.others",
        ):
            refused(mine, statement)
        StudyStore(mine).delete(record.name)


def test_a_reader_looks_and_writes_nothing(database: Database, logins: tuple[str, str]) -> None:
    record = new_study(database, 2)
    with Database.open(logins[1]) as mine:
        assert StudyStore(mine).get(record.name).n_slots == 2
        assert optuna.load_study(study_name=record.name, storage=mine.optuna_storage()).trials == []
        with pytest.raises(StorageError, match="permission denied"):
            StudyStore(mine).delete(record.name)
        for statement in (
            "DELETE FROM was.study",
            "UPDATE was.slot SET state = 'failed'",
            "DELETE FROM public.trials",
            "INSERT INTO was.artifact (kind, key) VALUES ('x', 'y')",
            "SELECT * FROM public.others",
        ):
            refused(mine, statement)
    assert StudyStore(database).get(record.name).n_slots == 2


def test_again_changes_nothing_and_names_what_it_does(
    database: Database, names: tuple[str, str], logins: tuple[str, str]
) -> None:
    again = init_roles(database, *names)
    assert not any(statement.startswith("CREATE ROLE") for statement in again)
    assert all(statement.startswith("GRANT ") for statement in again)


@pytest.mark.parametrize("name", ["", "Upper", "a b", 'x"; DROP TABLE was.slot; --', "1a", "x" * 64])
def test_names_that_are_none(database: Database, name: str) -> None:
    with pytest.raises(ConfigError, match="a role's name has lower case letters"):
        init_roles(database, name)
    with pytest.raises(ConfigError, match="reader: must be another role"):
        init_roles(database, "same", "same")


def test_a_login_that_may_not_make_roles(database: Database, logins: tuple[str, str]) -> None:
    with Database.open(logins[0]) as mine, pytest.raises(StorageError, match="permission denied to create role"):
        init_roles(mine, f"other_{uuid.uuid4().hex[:8]}")


def test_the_command(database: Database, names: tuple[str, str], logins: tuple[str, str]) -> None:
    from typer.testing import CliRunner

    from was_search.service.cli.main import app

    result = CliRunner().invoke(
        app, ["db", "init", "--coordinator", names[0], "--reader", names[1]], env={"WAS_SEARCH_STORAGE": database.url}
    )
    assert result.exit_code == 0, result.output
    assert "GRANT INSERT, UPDATE, DELETE ON was.artifact" in result.output
    assert "login_" not in result.output
    wrong = CliRunner().invoke(app, ["db", "init", "--reader", "No"], env={"WAS_SEARCH_STORAGE": database.url})
    assert isinstance(wrong.exception, ConfigError)
