"""The coordinator's session: the only writer of a study's slots and trials."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import select

from was_search.errors import StudyError
from was_search.process.logs import event
from was_search.studies.hand_outs import HandOut, Result
from was_search.studies.slots import Slot, SlotState
from was_storage.server.database import Database
from was_storage.server.plain import plain
from was_storage.server.schema import study as study_table
from was_storage.studies import batches, optuna_study, page_rows, reconcile, slot_rows, trials
from was_storage.studies.fence import Fence

_LONGEST_ERROR = 4000
_logger = logging.getLogger(__name__)


class CoordinatorSession:
    """One coordinator's hold on one study; a context manager made by ``StudyStore.coordinate``.

    Ownership: entering takes the study's lock and a new epoch, and repairs what a crash left
    (:meth:`reconcile`); leaving releases the lock. Every write is conditional on the epoch, so a
    coordinator that lost its lock (a database restart drops it) and was replaced can write nothing more.
    Thread-safe: writes run one at a time. Every method that writes may be repeated after a TransientError:
    it finishes what was begun.

    Every method that writes raises:
        StudyError: another coordinator has taken over, or the session is closed.
        TransientError: the connection was lost or the database restarts; call again.

    Attributes:
        name: the study's.
        optuna_study_id: of the Optuna study in the same database.
        repaired: repairs made on entry.
    """

    def __init__(self, database: Database, study_id: int, name: str) -> None:
        """Use :meth:`was_storage.studies.store.StudyStore.coordinate`."""
        self.name = name
        self.optuna_study_id = 0
        self.repaired = 0
        self._database = database
        self._study_id = study_id
        self._fence = Fence(database, study_id, name)
        self._unsure: set[int] = set()
        self._kinds = batches.KnownKinds()
        self._trial_ids: dict[int, int] = {}

    def __enter__(self) -> CoordinatorSession:
        """Take over the study.

        Raises:
            StudyError: another coordinator is alive, or the study was deleted.
        """
        self._fence.take_over()
        try:
            self.optuna_study_id = self._ensure_optuna_study()
            self.repaired = self.reconcile()
            event(_logger, "study taken over", study=self.name, epoch=self.epoch, repaired=self.repaired)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Idempotent; writes are refused afterwards."""
        self._fence.release()

    @property
    def study_id(self) -> int:
        """The study's id in our tables."""
        return self._study_id

    @property
    def epoch(self) -> int:
        """The number of this takeover."""
        return self._fence.epoch

    def slots(self) -> list[Slot]:
        """All slots, by number."""
        with self._database.begin() as connection:
            return slot_rows.read_slots(connection, self._study_id)

    def finished_since(self, moment: datetime | None) -> list[Slot]:
        """Slots that finished at ``moment`` or later, all finished ones for None, by number."""
        with self._database.begin() as connection:
            return slot_rows.read_slots(connection, self._study_id, finished_since=moment, finished=True)

    def show(self, note: str, figures: Mapping[str, str]) -> None:
        """Show ``note`` and ``figures`` on the study's page in optuna-dashboard (:mod:`was_storage.studies.page_rows`).

        One short transaction: nothing else is written meanwhile.
        """
        with self._fence.transaction() as connection:
            page_rows.write(connection, self.optuna_study_id, note, figures)

    def begin(self, hand_outs: Sequence[HandOut], lease_seconds: float) -> list[int]:
        """Hand waiting slots to workers, with a vector and an Optuna trial where there is none yet, in one transaction.

        All or nothing: where one is refused, none is handed out. Repeated for the same workers it changes nothing.
        A slot's vector never changes: the same may be given again, another is refused.

        Returns:
            The attempts, from 1, in the order of ``hand_outs``.

        Raises:
            StudyError: no such slot; it is not waiting, has no vector and is given none, or has another one; params
                outside their distributions; arrays whose shapes differ or that are not finite; the Optuna study is
                gone.
        """
        with self._fence.transaction() as connection:
            attempts = batches.begin(
                connection,
                self._study_id,
                self.optuna_study_id,
                self.epoch,
                hand_outs,
                lease_seconds,
                self._kinds,
                self._trial_ids,
            )
        for hand_out, attempt in zip(hand_outs, attempts, strict=True):
            self._tell_log("slot handed out", hand_out.number, attempt=attempt, worker=hand_out.worker)
        return attempts

    def trial_of(self, number: int) -> int | None:
        """Optuna's id of the trial of a slot that this session has handed out."""
        return self._trial_ids.get(number)

    def _tell_log(self, name: str, number: int, **fields: Any) -> None:
        event(_logger, name, study=self.name, slot=number, trial=self.trial_of(number), **fields)

    def finish_all(self, results: Sequence[Result]) -> list[bool]:
        """Commit results and tell Optuna of them in one transaction; returns for each whether it counts.

        Only the attempt that is running counts: a late or second result is ignored, also one in the same batch. A loss
        that is not a finite number makes the slot failed.

        Raises:
            StudyError: a state that is not a finished one.
        """
        checked = [(_checked(result), plain(dict(result.attrs or {}))) for result in results]
        numbers = {slot.number for slot, _ in checked}
        with self._fence.transaction() as connection:
            unsure = self._unsure & numbers
            self._unsure |= numbers
            counted = batches.finish(connection, self._study_id, checked, unsure)
        self._unsure -= numbers
        self._log_results(checked, counted)
        return counted

    def _log_results(self, results: Sequence[tuple[Slot, dict[str, Any]]], counted: Sequence[bool]) -> None:
        for (slot, _), counts in zip(results, counted, strict=True):
            self._tell_log(
                "slot finished" if counts else "late result ignored",
                slot.number,
                attempt=slot.attempt,
                worker=slot.worker,
                state=str(slot.state),
                loss_nats=slot.loss_nats,
                tokens=slot.tokens,
                seconds=slot.seconds,
                error=slot.error or None,
            )

    def requeue(self, number: int, reason: str) -> bool:
        """Put a running slot back with its vector, trial and attempt count; False where it is not running."""
        with self._fence.transaction() as connection:
            if slot_rows.read(connection, self._study_id, number).state != SlotState.RUNNING:
                return False
            values = {"state": SlotState.WAITING, "worker": "", "lease_expires_at": None, "error": _storable(reason)}
            slot_rows.write(connection, self._study_id, number, **values)
        self._tell_log("slot put back", number, reason=reason)
        return True

    def reconcile(self) -> int:
        """Make slots and Optuna's trials agree one to one; returns the number of repairs.

        Runs on entry; idempotent.

        Slots left running by an earlier coordinator wait again, with the same vector and attempt count.
        Missing trials are made, surplus ones told FAIL, and finished slots told.
        """
        with self._fence.transaction() as connection:
            repairs = slot_rows.requeue_left_running(connection, self._study_id, self.epoch)
            repairs += reconcile.repair(connection, self._study_id, self.optuna_study_id)
        if repairs:
            event(_logger, "repaired after an interruption", study=self.name, repairs=repairs)
        return repairs

    def shrink(self, n_slots: int) -> int:
        """Remove waiting slots from ``n_slots`` on, but only after the last one that has a vector or was handed out.

        Returns the number of slots left, which may be more than ``n_slots``.
        """
        with self._fence.transaction() as connection:
            return slot_rows.drop_slots(connection, self._study_id, n_slots)

    def _ensure_optuna_study(self) -> int:
        storage = self._database.optuna_storage()
        with self._fence.transaction() as connection:
            known = connection.execute(
                select(study_table.c.optuna_study_id).where(study_table.c.id == self._study_id)
            ).scalar()
            return optuna_study.ensure(connection, storage, self._study_id, self.name, known)


def _checked(result: Result) -> Slot:
    """The result as a slot, in storable form; failed where a loss is not finite."""
    if not result.state.finished:
        raise StudyError(f"state: a slot finishes complete, stopped or failed, got {result.state}")
    return trials.refuse_not_finite(
        Slot(
            result.number,
            result.state,
            result.attempt,
            losses=None if result.losses is None else np.asarray(result.losses, np.float64).ravel(),
            loss_nats=None if result.loss_nats is None else float(result.loss_nats),
            nll_nats=None if result.nll_nats is None else float(result.nll_nats),
            tokens=int(result.tokens),
            seconds=float(result.seconds),
            achieved=None if result.achieved is None else float(result.achieved),
            worker=result.worker,
            error=_storable(result.error),
        )
    )


def _storable(words: str) -> str:
    return words.replace("\0", "")[:_LONGEST_ERROR]
