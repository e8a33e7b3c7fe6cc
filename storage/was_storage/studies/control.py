"""Both sides of a study's control: whoever asks something of it, and the coordinator that obeys."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects.postgresql import insert

from was_search.errors import StudyError
from was_search.studies.control import Control, Ending, Overrides, Spent, Usage, Wish
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.server.schema import control, run, slot, study
from was_storage.studies import control_rows, slot_rows
from was_storage.studies.coordinator_lock import free, held
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyStore

_LONGEST_DETAIL = 4000


class ControlStore:
    """Asks something of studies, from any process that reaches the database, whether they are running or not.

    Every method is one transaction that needs no coordinator's lock, and may be repeated. Thread-safe. Raises
    TransientError where the connection is lost, StudyError where there is no such study.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, name: str) -> Control:
        """What is asked of the study at present."""
        study_id = StudyStore(self._database).id_of(name)
        with self._database.begin() as connection:
            return control_rows.read(connection, study_id)

    def wish(self, name: str, wish: Wish) -> bool:
        """Ask the study's coordinator to ``wish``; returns whether one is alive."""
        study_id = StudyStore(self._database).id_of(name)
        with self._database.begin() as connection:
            control_rows.write_wish(connection, study_id, wish)
            return held(connection, study_id)

    def set(self, name: str, overrides: Overrides) -> bool:
        """Change the study's number of trials, workers or limits; returns whether a coordinator is alive.

        More trials are added at once. Fewer are possible down to the last slot that was handed out or has a
        vector: a slot that anything is known of is never removed. A living coordinator removes the rest itself.

        Raises:
            StudyError: fewer ``trials`` than that.
        """
        study_id = StudyStore(self._database).id_of(name)
        with self._database.begin() as connection:
            # Every write of the coordinator shares this row: none is half done now, and none begins.
            connection.execute(select(study.c.id).where(study.c.id == study_id).with_for_update())
            if overrides.trials is not None:
                self._resize(connection, study_id, overrides.trials)
            control_rows.write_overrides(connection, study_id, overrides.given)
            return held(connection, study_id)

    def spent(self, names: Collection[str]) -> Spent:
        """What all runs of the named studies have used up; studies that do not exist count as nothing."""
        with self._database.begin() as connection:
            return control_rows.spent(connection, names)

    def now(self) -> datetime:
        """The database's clock."""
        with self._database.begin() as connection:
            return connection.execute(select(func.now())).scalar_one()

    def _resize(self, connection: Connection, study_id: int, trials: int) -> None:
        least = slot_rows.untouched_from(connection, study_id)
        if trials < least:
            done = [str(state) for state in SlotState if state.finished]
            finished = select(func.count()).where(slot.c.study_id == study_id, slot.c.state.in_(done))
            raise StudyError(
                f"trials: must be at least {least}, got {trials}: the study has used {least} slots already, "
                f"{connection.execute(finished).scalar_one()} of them finished, and keeps them"
            )
        if trials >= slot_rows.add_slots(connection, study_id, trials):
            return
        if free(connection, study_id):
            slot_rows.drop_slots(connection, study_id, trials)


class ControlSession:
    """A coordinator's side: reads what is asked of its study, and writes down how its run goes.

    Made inside the coordinator's session. It writes only the row of its own run, so a coordinator that was replaced
    disturbs nobody. Every method may be repeated after a TransientError, which it raises where the connection is
    lost.
    """

    def __init__(self, database: Database, session: CoordinatorSession) -> None:
        self._database = database
        self._study_id = session.study_id
        self._name = session.name
        self._epoch = session.epoch

    def open(self, *, gpus_per_worker: float, asked_since: datetime) -> Wish:
        """Begin the run; returns what was wished before it.

        A drain or cancel from before ``asked_since`` was meant for an earlier run and is taken back.
        """
        values = {
            "study_id": self._study_id,
            "epoch": self._epoch,
            "coordinator": f"{socket.gethostname()}:{os.getpid()}",
            "gpus_per_worker": gpus_per_worker,
        }
        with self._database.begin() as connection:
            before = control_rows.read(connection, self._study_id).wish
            ends = [str(wish) for wish in Wish if wish.ends]
            old = control.c.wish.in_(ends) & (control.c.wished_at < asked_since)
            mine = control.c.study_id == self._study_id
            connection.execute(update(control).where(mine & old).values(wish=str(Wish.RUN), wished_at=func.now()))
            connection.execute(insert(run).values(**values).on_conflict_do_nothing())
        return before

    def spent_before(self) -> Spent:
        """What the study's earlier runs have used up, as they have last said."""
        sums = select(func.sum(run.c.seconds), func.sum(run.c.gpu_seconds))
        query = sums.where(run.c.study_id == self._study_id, run.c.epoch != self._epoch)
        with self._database.begin() as connection:
            seconds, gpu_seconds = connection.execute(query).one()
        return Spent(seconds or 0.0, gpu_seconds or 0.0)

    def read(self) -> Control:
        """What is asked of the study; cheap enough for once a second.

        Raises:
            StudyError: the study was deleted.
        """
        with self._database.begin() as connection:
            return control_rows.read(connection, self._study_id)

    def beat(self, usage: Usage) -> None:
        """Write down what the run has used, and that its coordinator is alive."""
        values = {
            "seen_at": func.now(),
            "paused": usage.paused,
            "workers": usage.workers,
            "detail": usage.activity,
            "pool": {} if usage.pool is None else usage.pool.to_json(),
            "seconds": usage.spent.seconds,
            "gpu_seconds": usage.spent.gpu_seconds,
            "worker_seconds": usage.worker_seconds,
        }
        self._write(values)

    def close(self, ending: Ending) -> None:
        """Write down how the run ended."""
        detail = ending.detail.replace("\0", "")[:_LONGEST_DETAIL]
        self._write({"seen_at": func.now(), "ended_at": func.now(), "ending": str(ending.kind), "detail": detail})

    def _write(self, values: dict[str, object]) -> None:
        mine = (run.c.study_id == self._study_id) & (run.c.epoch == self._epoch)
        with self._database.begin() as connection:
            connection.execute(update(run).where(mine).values(**values))
