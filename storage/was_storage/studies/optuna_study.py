"""The Optuna study that mirrors ours: made, found again after a crash, made anew when it was deleted."""

from __future__ import annotations

from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from sqlalchemy import Connection, select, update

from was_search.errors import StudyError
from was_storage.server.schema import slot, study

METRIC_NAMES = "study:metric_names"
"""Where ``optuna.Study.set_metric_names`` keeps names of objectives; without one the dashboard says "Objective 0"."""

OBJECTIVE = "loss in nats per token"


def ensure(connection: Connection, storage: BaseStorage, study_id: int, name: str, known: int | None) -> int:
    """Optuna's id of the study's mirror, which is made where it is missing.

    The caller's transaction must hold the study's row, so that two processes do not make it twice. Where
    the known mirror is gone (deleted in the dashboard, say) a new one is linked and every slot forgets its
    trial.

    Raises:
        StudyError: an Optuna study of that name has trials that are not ours, or is not minimised.
    """
    if known is not None and exists(storage, known):
        return known
    try:
        found = storage.create_new_study([StudyDirection.MINIMIZE], name)
    except DuplicatedStudyError:
        found = storage.get_study_id_from_name(name)
        _check_ours(connection, storage, found, name)
    storage.set_study_system_attr(found, METRIC_NAMES, [OBJECTIVE])
    connection.execute(update(study).where(study.c.id == study_id).values(optuna_study_id=found))
    connection.execute(update(slot).where(slot.c.study_id == study_id).values(trial_id=None))
    return found


def exists(storage: BaseStorage, optuna_study_id: int) -> bool:
    try:
        storage.get_study_name_from_id(optuna_study_id)
    except KeyError:
        return False
    return True


def drop(storage: BaseStorage, optuna_study_id: int | None) -> None:
    """Delete the mirror; nothing happens where it is gone already."""
    if optuna_study_id is None:
        return
    try:
        storage.delete_study(optuna_study_id)
    except KeyError:
        return


def _check_ours(connection: Connection, storage: BaseStorage, found: int, name: str) -> None:
    """Refuse an Optuna study that is not ours: a mirror that a crash left unlinked is empty."""
    taken = connection.execute(select(study.c.name).where(study.c.optuna_study_id == found)).scalar()
    if (
        taken is not None
        or storage.get_n_trials(found)
        or storage.get_study_directions(found) != [StudyDirection.MINIMIZE]
    ):
        raise StudyError(
            f"study {name!r}: the database has an Optuna study of that name that was-search did not make; "
            "choose another name"
        )
