"""Names of studies as people may type them: one study each, on a real server, or refused in one line."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.doubles.small_study import new_study
from was_search.errors import StudyError
from was_search.service.cli.main import app
from was_search.studies.names import check_name
from was_search.studies.overview import overview
from was_storage.server.database import Database
from was_storage.studies.overview import read_snapshot
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))

words = st.text("aé%:/\\'\"$(){}[]<>;.-_ \t\n\0\u202e\ud800ﬁ", max_size=12)
names = st.one_of(st.text(max_size=210), words, words.map(lambda word: "--" + word))


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names)
def test_a_name_is_one_study_or_refused(database: Database, name: str) -> None:
    store = StudyStore(database)
    before = {record.name for record in store.list()}
    if refused(name):
        with pytest.raises(StudyError) as caught:
            new_study(database, 1, name or " ")
        assert len(str(caught.value).splitlines()) == 1
        assert {record.name for record in store.list()} == before
        shown = CliRunner().invoke(app, ["status", "--", name], env={"WAS_SEARCH_STORAGE": database.url})
        assert name == "" or isinstance(shown.exception, StudyError)
        return
    new_study(database, 1, name)
    assert {record.name for record in store.list()} == before | {name}
    assert store.get(name).name == name
    assert overview(read_snapshot(database, name)).play == "idle"
    store.delete(name)
    assert {record.name for record in store.list()} == before


def refused(name: str) -> bool:
    try:
        check_name(name)
    except StudyError:
        return True
    return False
