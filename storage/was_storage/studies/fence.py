"""What keeps a study to one writer: a lock for courtesy, an epoch for safety."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, func, select, update

from was_search.errors import StudyError
from was_storage.server.database import Database
from was_storage.server.schema import study
from was_storage.studies.coordinator_lock import CoordinatorLock
from was_storage.studies.pulse import Pulse


class Fence:
    """Transactions on a study that only its newest coordinator gets.

    The lock refuses a second coordinator while one is alive, but a restart of the database drops it. The
    epoch is raised by every takeover and compared in every transaction, so that a replaced coordinator
    writes nothing more. A pulse says that it is alive. Thread-safe: transactions run one at a time.
    """

    def __init__(self, database: Database, study_id: int, name: str) -> None:
        self.epoch = 0
        self._database = database
        self._study_id = study_id
        self._name = name
        self._lock = CoordinatorLock(database, study_id, name)
        self._serial = threading.RLock()
        self._open = False
        self._pulse = Pulse(self._beat)

    def take_over(self) -> None:
        """Take the lock and a new epoch, and be seen from now on.

        Raises:
            StudyError: another coordinator is alive, or the study was deleted.
            StorageError: the connection is not one session.
            TransientError: the connection was lost.
        """
        with self._serial:
            self._lock.acquire()
            try:
                self.epoch = self._next_epoch()
            except BaseException:
                self._lock.release()
                raise
            self._open = True
            self._pulse.start()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction during which nobody can take over: a takeover waits for its share of the study's row.

        Raises:
            StudyError: another coordinator has taken over, or the fence was released.
            TransientError: the connection was lost; what the block wrote was not committed, or may have been.
        """
        with self._serial:
            if not self._open:
                raise StudyError(f"study {self._name!r}: this coordinator's session is closed")
            self._lock.renew()
            with self._database.begin() as connection:
                query = select(study.c.epoch).where(study.c.id == self._study_id).with_for_update(read=True)
                epoch = connection.execute(query).scalar()
                if epoch != self.epoch:
                    raise StudyError(
                        f"study {self._name!r}: another coordinator has taken over (epoch {epoch}, ours was "
                        f"{self.epoch}); this one must stop, nothing is lost"
                    )
                yield connection

    def release(self) -> None:
        """Give the lock up; transactions are refused from now on. Idempotent."""
        with self._serial:
            self._open = False
            self._pulse.stop()
            self._lock.release()

    def _beat(self) -> None:
        with self._serial:
            if self._open:
                self._lock.renew()
                mine = (study.c.id == self._study_id) & (study.c.epoch == self.epoch)
                with self._database.begin() as connection:
                    connection.execute(update(study).where(mine).values(seen_at=func.now()))

    def _next_epoch(self) -> int:
        statement = update(study).where(study.c.id == self._study_id).values(epoch=study.c.epoch + 1)
        with self._database.begin() as connection:
            epoch = connection.execute(statement.returning(study.c.epoch)).scalar()
        if epoch is None:
            raise StudyError(f"study {self._name!r} was deleted")
        return int(epoch)
