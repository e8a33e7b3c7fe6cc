"""Shows a note and plots on a study's page in optuna-dashboard from a process that is not its coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sqlalchemy import Connection, select

from was_search.errors import StudyError
from was_storage.server.database import Database
from was_storage.server.optuna_tables import require_known
from was_storage.server.schema import study
from was_storage.studies import page_rows
from was_storage.studies.coordinator_lock import held

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def show_idle(database: Database, name: str, note: str, figures: Mapping[str, str]) -> bool:
    """Show ``note`` and ``figures`` on the page of a study that no coordinator runs; returns whether none runs it.

    A coordinator that is alive keeps the page fresh itself, and what it knows is newer.

    Raises:
        StudyError: there is no such study, or a figure's id is not valid.
        StorageError: Optuna's tables are of another version.
        TransientError: the connection was lost.
    """
    with database.begin() as connection:
        study_id, optuna_study_id = _ids(connection, name)
        if held(connection, study_id):
            return False
        page_rows.write(connection, optuna_study_id, note, figures)
        return True


def annotate(database: Database, name: str, *, note: str | None, figures: Mapping[str, Figure]) -> None:
    """Show ``note`` (Markdown) and ``figures`` on the study's page, whether a coordinator runs it or not.

    Idempotent: a figure's name is its id, and saving it again replaces it; what is unchanged is not written.

    Args:
        database: holds the study.
        name: the study's name.
        note: replaces the study's note; None leaves it.
        figures: plotly figures by id: letters, digits, ``-``, ``_`` and ``.``.

    Raises:
        StudyError: there is no such study, or a figure's id has other characters.
        StorageError: Optuna's tables are of another version.
        TransientError: the connection was lost.
    """
    with database.begin() as connection:
        _, optuna_study_id = _ids(connection, name)
        shown = {figure_id: figure.to_json() for figure_id, figure in figures.items()}
        page_rows.write(connection, optuna_study_id, note, shown)


def _ids(connection: Connection, name: str) -> tuple[int, int]:
    """The ids of a study and its Optuna study; nobody can take it over or delete it in this transaction."""
    query = select(study.c.id, study.c.optuna_study_id).where(study.c.name == name).with_for_update(read=True)
    row = connection.execute(query).one_or_none()
    if row is None or row.optuna_study_id is None:
        raise StudyError(f"study {name!r} has no Optuna study in this database")
    require_known(connection)
    return row.id, row.optuna_study_id
