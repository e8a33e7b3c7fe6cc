"""The command that deletes a study: what it asks, what it removes, and what it refuses."""

from __future__ import annotations

import io
import json
import uuid

import pytest
from sqlalchemy import text

from tests.doubles.small_study import finish, hand_out, new_study, terminate_connections
from tests.was_search.service.cli.test_study import typed  # noqa: F401 - a fixture
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def name(database: Database) -> str:
    """A study of six slots, one of them complete."""
    name = new_study(database, 6, f"delete-{uuid.uuid4().hex[:6]}").name
    with StudyStore(database).coordinate(name) as session:
        finish(session, 0, hand_out(session, 0), SlotState.COMPLETE, losses=[2.0, 2.2])
    return name


def there(database: Database) -> list[str]:
    return [record.name for record in StudyStore(database).list()]


def test_yes_deletes_and_says_what(typed, database: Database, name: str) -> None:  # noqa: F811
    record = StudyStore(database).get(name)
    other = new_study(database).name
    code, out, _ = typed("delete", name, "--yes")
    assert code == 0
    assert f"deleted: study {name} of postgresql" in out
    assert "1 of 6 trials finished, best 2.1000 nats on the search split" in out.replace("\n", " ")
    assert name not in there(database)
    assert other in there(database)
    with database.begin() as connection:
        query = text("SELECT count(*) FROM was.slot WHERE study_id = :id")
        assert connection.execute(query, {"id": record.id}).scalar() == 0
    with pytest.raises(KeyError):
        database.optuna_storage().get_study_name_from_id(record.optuna_study_id)
    code, _, err = typed("delete", name, "--yes")
    assert code == 1
    assert f"study {name!r} does not exist" in err


def test_json_has_what_was_deleted(typed, name: str) -> None:  # noqa: F811
    _, out, _ = typed("delete", name, "--yes", "--json")
    found = json.loads(out.splitlines()[-1])
    assert (found["deleted"], found["study"], found["n_slots"], found["best_loss_nats"]) == (True, name, 6, 2.1)
    assert found["counts"]["complete"] == 1


@pytest.mark.parametrize(("answer", "goes"), [("y", True), (" YES", True), ("n", False), ("", False), ("yess", False)])
def test_a_terminal_is_asked(typed, database: Database, name: str, monkeypatch, answer: str, goes: bool) -> None:  # noqa: F811
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    code, out, err = typed("delete", name)
    assert f"delete study {name} of postgresql" in err
    assert err.rstrip().endswith("? [y/N]")
    assert (code, name in there(database)) == (0 if goes else 1, not goes)
    assert ("nothing was deleted" in out) is not goes


def test_without_a_terminal_yes_is_needed(typed, database: Database, name: str, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, _, err = typed("delete", name)
    assert code == 1
    assert f"delete: give --yes to delete study {name}" in err
    assert "Traceback" not in err
    assert name in there(database)


def test_a_study_that_is_being_run_is_refused(typed, database: Database, name: str, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    with StudyStore(database).coordinate(name):
        for words in ((), ("--yes",)):
            code, _, err = typed("delete", name, *words)
            assert code == 1
            assert f"study {name!r} is being run by a coordinator; stop it before" in err.replace("\n", " ")
            assert "[y/N]" not in err
        terminate_connections(database)  # it died
        assert typed("delete", name, "--yes")[0] == 0
    assert name not in there(database)


def test_close_names_are_suggested(typed, name: str) -> None:  # noqa: F811
    code, _, err = typed("delete", f"{name}x", "--yes")
    assert code == 1
    assert f"did you mean {name!r}?" in err.replace("\n", " ")
