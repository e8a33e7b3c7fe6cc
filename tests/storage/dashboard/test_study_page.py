"""Notes and plots written straight into Optuna's tables, read with optuna-dashboard's own functions."""

from __future__ import annotations

import optuna
import plotly.graph_objects as go
import pytest
from optuna_dashboard import get_note, save_note, save_plotly_graph_object
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from tests.doubles.small_study import new_study
from was_search.errors import StudyError
from was_storage.dashboard import study_page
from was_storage.server.database import Database
from was_storage.studies import page_rows
from was_storage.studies.store import StudyRecord, StudyStore

pytestmark = pytest.mark.postgres

FIGURE = go.Figure(go.Bar(y=list(range(1500)), name='quote " backslash \\ ünïcode \u2028')).to_json()


def shown(database: Database, record: StudyRecord) -> tuple[str, dict[str, str]]:
    storage = database.optuna_storage()
    study = optuna.load_study(study_name=record.name, storage=storage)
    return get_note(study), get_plotly_graph_objects(storage.get_study_system_attrs(study._study_id))


def write(database: Database, record: StudyRecord, note: str | None, figures: dict[str, str]) -> int:
    with database.begin() as connection:
        return page_rows.write(connection, record.optuna_study_id, note, figures)


def test_the_dashboard_reads_what_was_written(database: Database) -> None:
    record = new_study(database)
    for note, figures in [
        ("# Note\n" * 1000, {"progress": FIGURE, "progress-time": "{}", "empty": ""}),
        ("shorter \N{SNOWMAN}", {"progress": "{}"}),
        ("", {"progress": FIGURE}),
    ]:
        with StudyStore(database).coordinate(record.name) as session:
            session.show(note, figures)
        found, plots = shown(database, record)
        assert found == note
        assert {name: plots.get(name, "") for name in figures} == figures
        assert plots["progress-time"] == "{}"


def test_it_is_what_the_dashboard_itself_writes(database: Database) -> None:
    ours, theirs = new_study(database), new_study(database)
    note, figure = "long " * 2000, go.Figure(go.Bar(y=list(range(2000))))
    write(database, ours, note, {"levels": figure.to_json()})
    study = optuna.load_study(study_name=theirs.name, storage=database.optuna_storage())
    save_note(study, note)
    save_plotly_graph_object(study, figure, graph_object_id="levels")
    mine, other = (database.optuna_storage().get_study_system_attrs(r.optuna_study_id) for r in (ours, theirs))
    assert mine == other


def test_only_what_changed_is_written(database: Database) -> None:
    record = new_study(database)
    assert write(database, record, "a note", {"levels": FIGURE}) == 2 + -(-len(FIGURE) // 2045)
    assert write(database, record, "a note", {"levels": FIGURE}) == 0
    assert write(database, record, None, {"levels": FIGURE + " "}) == 1
    assert write(database, record, "another", {"levels": FIGURE + " "}) == 2, "the note and its version"


def test_an_id_that_html_does_not_take_is_refused(database: Database) -> None:
    record = new_study(database)
    with pytest.raises(StudyError, match=r"figure 'a b': an id has letters, digits, '-', '_' and '\.' only"):
        write(database, record, None, {"a b": ""})


def test_a_replaced_coordinator_shows_nothing(database: Database) -> None:
    record = new_study(database)
    with StudyStore(database).coordinate(record.name) as session:
        session.show("its note", {"levels": "{}"})
        with database.begin() as connection:
            connection.exec_driver_sql("UPDATE was.study SET epoch = epoch + 1 WHERE id = %s", (record.id,))
        with pytest.raises(StudyError, match="another coordinator has taken over"):
            session.show("an old story", {"levels": FIGURE})
    assert shown(database, record) == ("its note", {"levels": "{}"})


def test_a_page_is_written_from_outside_only_while_nobody_runs_the_study(database: Database) -> None:
    record = new_study(database)
    with StudyStore(database).coordinate(record.name) as session:
        session.show("running", {})
        assert not study_page.show_idle(database, record.name, "from outside", {})
        assert shown(database, record)[0] == "running"
    assert study_page.show_idle(database, record.name, "from outside", {"levels": "{}"})
    assert shown(database, record) == ("from outside", {"levels": "{}"})
    with pytest.raises(StudyError, match="study 'nope' has no Optuna study in this database"):
        study_page.show_idle(database, "nope", "", {})
