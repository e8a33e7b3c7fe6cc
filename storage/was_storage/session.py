"""The coordinator's session: the only writer of a study's slots and trials."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import Connection, Row, func, select

from was_search.errors import StudyError
from was_search.hand_out import HandOut, Result
from was_search.logs import event
from was_search.slots import Slot, SlotState
from was_storage import batches, optuna_rows, optuna_study, reconcile, slot_rows, study_page, trials
from was_storage.database import Database
from was_storage.fence import Fence
from was_storage.plain import plain
from was_storage.proposal import vector_columns
from was_storage.schema import study as study_table

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
        """Use :meth:`was_storage.studies.StudyStore.coordinate`."""
        self.name = name
        self.optuna_study_id = 0
        self.repaired = 0
        self._database = database
        self._study_id = study_id
        self._fence = Fence(database, study_id, name)
        self._untold: set[int] = set()
        self._unsure: set[int] = set()
        self._kinds = batches.KnownKinds()
        self._direct = False
        self._trial_ids: dict[int, int] = {}

    def __enter__(self) -> CoordinatorSession:
        """Take over the study.

        Raises:
            StudyError: another coordinator is alive, or the study was deleted.
        """
        self._fence.take_over()
        try:
            self.optuna_study_id = self._ensure_optuna_study()
            with self._database.begin() as connection:
                self._direct = optuna_rows.known(connection)
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

    def finished_trials(self) -> list[FrozenTrial]:
        """The finished slots that have a vector as Optuna trials, in the order they finished, from our
        tables alone.

        For filling an in-memory study; a trial's number is its slot's.
        """
        with self._database.begin() as connection:
            rows = slot_rows.read_all(connection, self._study_id, proposed=True)
        finished = [row for row in rows if SlotState(row.state).finished]
        finished.sort(key=lambda row: (row.finished_at, row.number))
        return [
            trials.finished_trial(trials.slot_from_row(row), trials.distributions_from_json(row.distributions))
            for row in finished
        ]

    def finished_since(self, moment: datetime | None) -> list[Slot]:
        """Slots that finished at ``moment`` or later, all finished ones for None, by number."""
        with self._database.begin() as connection:
            return slot_rows.read_slots(connection, self._study_id, finished_since=moment, finished=True)

    def show(self, note: str, figures: Mapping[str, str]) -> None:
        """Show ``note`` and ``figures`` on the study's page in optuna-dashboard; see :mod:`was_storage.study_page`.

        One short transaction: nothing else is written meanwhile. Where Optuna's tables are of a revision that we do
        not know, its API is used.
        """
        with self._fence.transaction() as connection:
            study_page.show(connection, self._database, self.optuna_study_id, note, figures)

    def propose(
        self,
        number: int,
        *,
        origin: str,
        params: Mapping[str, float],
        distributions: Mapping[str, BaseDistribution],
        levels: npt.ArrayLike,
        sparsities: npt.ArrayLike,
        attrs: Mapping[str, Any] | None = None,
    ) -> Slot:
        """Give a waiting slot its vector, and create its Optuna trial as RUNNING; returns the slot.

        A slot's vector never changes: proposing the same again completes what was interrupted, another is
        refused.

        Args:
            number: the slot's.
            origin: where the vector comes from; see :class:`was_search.slots.Slot`.
            params: raw suggestion by parameter name.
            distributions: of the same names.
            levels: the projected vector, [L].
            sparsities: nominal, [L, 7].
            attrs: further user attributes of the trial.

        Raises:
            StudyError: no such slot; it has another vector or is not waiting; params outside their
                distributions; arrays whose shapes differ or that are not finite.
        """
        values = vector_columns(number, origin, params, distributions, levels, sparsities, attrs or {})
        interrupted = self._store_vector(number, values)
        return self._link_trial(number, interrupted=interrupted)

    def start(self, number: int, worker: str, lease_seconds: float) -> int:
        """Hand a waiting slot to ``worker``; returns the attempt, from 1. Repeated for the same worker it
        changes nothing.

        Raises:
            StudyError: no such slot, it has no vector yet, or it is not waiting.
        """
        with self._fence.transaction() as connection:
            row = self._row(connection, number)
            if row.state == SlotState.RUNNING and row.epoch == self.epoch and row.worker == worker:
                return int(row.attempt)
            self._trial_ids[number] = row.trial_id
            if row.state != SlotState.WAITING or row.trial_id is None:
                found = row.state if row.state != SlotState.WAITING else "without a vector"
                raise StudyError(f"slot {number}: only a proposed, waiting slot can be started, it is {found}")
            attempt = int(row.attempt) + 1
            lease = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, float(lease_seconds))
            self._write(
                connection,
                number,
                state=SlotState.RUNNING,
                attempt=attempt,
                epoch=self.epoch,
                worker=worker,
                lease_expires_at=lease,
                started_at=func.now(),
                error="",
            )
            return attempt

    def begin(self, hand_outs: Sequence[HandOut], lease_seconds: float) -> list[int]:
        """:meth:`propose` and :meth:`start` for several slots in one transaction, Optuna's trials included.

        All or nothing: where one is refused, none is handed out. Repeated for the same workers it changes nothing.
        With an Optuna whose tables we do not know, the slots go one by one through its API.

        Returns:
            The attempts, from 1, in the order of ``hand_outs``.

        Raises:
            StudyError: as :meth:`propose` and :meth:`start`.
        """
        if not self._direct:
            attempts = [self._begin_one(hand_out, lease_seconds) for hand_out in hand_outs]
        else:
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
        """:meth:`finish` for several slots in one transaction, Optuna told in the same one; for each whether it is
        its slot's result.

        Raises:
            StudyError: a state that is not a finished one.
        """
        checked = [(_checked(result), plain(dict(result.attrs or {}))) for result in results]
        if not self._direct:
            booked = [self._finish_one(slot, attrs) for slot, attrs in checked]
            self._log_results(checked, booked)
            return booked
        numbers = {slot.number for slot, _ in checked}
        with self._fence.transaction() as connection:
            unsure = self._unsure & numbers
            self._unsure |= numbers
            booked = batches.finish(connection, self._study_id, checked, unsure)
        self._unsure -= numbers
        self._log_results(checked, booked)
        return booked

    def _log_results(self, results: Sequence[tuple[Slot, dict[str, Any]]], booked: Sequence[bool]) -> None:
        for (slot, _), counts in zip(results, booked, strict=True):
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
            if self._row(connection, number).state != SlotState.RUNNING:
                return False
            state = SlotState.WAITING
            self._write(connection, number, state=state, worker="", lease_expires_at=None, error=_storable(reason))
        self._tell_log("slot put back", number, reason=reason)
        return True

    def finish(
        self,
        number: int,
        attempt: int,
        state: SlotState,
        *,
        losses: npt.ArrayLike | None = None,
        loss_nats: float | None = None,
        nll_nats: float | None = None,
        tokens: int = 0,
        seconds: float = 0.0,
        achieved: float | None = None,
        worker: str = "",
        error: str = "",
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Commit a slot's result, then tell Optuna.

        Only the attempt that is running counts: a late or second result is ignored. A loss that is not a
        finite number makes the slot failed. Not telling Optuna (a crash, a lost connection) loses nothing:
        repeating the call or :meth:`reconcile` does it.

        The arguments are the fields of :class:`was_search.hand_out.Result`.

        Returns:
            Whether this attempt's result is the slot's.

        Raises:
            StudyError: no such slot, or ``state`` is not a finished one.
        """
        result = Result(
            number, attempt, state, losses, loss_nats, nll_nats, tokens, seconds, achieved, worker, error, attrs
        )
        return self._finish_one(_checked(result), plain(dict(attrs or {})))

    def reconcile(self) -> int:
        """Make slots and Optuna's trials agree one to one; returns the number of repairs. Runs on entry;
        idempotent.

        Slots left running by an earlier coordinator wait again, with the same vector and attempt count.
        Trials that were created but not linked are linked; those that cannot be are told FAIL. Missing
        trials are created, and finished slots are told.
        """
        storage = self._storage()
        with self._fence.transaction() as connection:
            repairs = slot_rows.requeue_left_running(connection, self._study_id, self.epoch)
            repairs += reconcile.link_trials(connection, storage, self._study_id, self.optuna_study_id)
        with self._fence.transaction() as connection:
            repairs += reconcile.tell_finished(connection, storage, self._study_id, self.optuna_study_id)
        if repairs:
            event(_logger, "repaired after an interruption", study=self.name, repairs=repairs)
        return repairs

    def extend(self, n_slots: int) -> int:
        """Add waiting slots until there are ``n_slots``; never removes any. Returns the number of slots."""
        with self._fence.transaction() as connection:
            return slot_rows.add_slots(connection, self._study_id, n_slots)

    def shrink(self, n_slots: int) -> int:
        """Remove waiting slots from ``n_slots`` on, those behind the last one that has a vector or was handed out.

        Returns the number of slots left, which may be more than ``n_slots``.
        """
        with self._fence.transaction() as connection:
            return slot_rows.drop_slots(connection, self._study_id, n_slots)

    def _begin_one(self, hand_out: HandOut, lease_seconds: float) -> int:
        if (proposal := hand_out.proposal) is not None:
            self.propose(hand_out.number, **vars(proposal))
        return self.start(hand_out.number, hand_out.worker, lease_seconds)

    def _finish_one(self, result: Slot, extra: dict[str, Any]) -> bool:
        number = result.number
        with self._fence.transaction() as connection:
            row = self._row(connection, number)
            if row.attempt == result.attempt and row.state == SlotState.RUNNING:
                self._untold.add(number)
                self._commit_result(connection, result, {**(row.attrs or {}), **extra})
            elif row.attempt != result.attempt or number not in self._untold:
                return False
        self._tell(number)
        return True

    def _store_vector(self, number: int, values: dict[str, Any]) -> bool:
        """First commit of a proposal; returns whether the vector was there already."""
        with self._fence.transaction() as connection:
            row = self._row(connection, number)
            if row.params is not None:
                if row.params != values["params"] or row.levels != values["levels"]:
                    raise StudyError(f"slot {number} has another vector already; it never changes")
                return True
            if row.state != SlotState.WAITING:
                raise StudyError(f"slot {number}: only a waiting slot can be given a vector, it is {row.state}")
            self._write(connection, number, **values)
            return False

    def _link_trial(self, number: int, *, interrupted: bool) -> Slot:
        """Second commit of a proposal: the trial exists and the slot knows it, with no takeover between."""
        storage = self._storage()
        refused = None
        with self._fence.transaction() as connection:
            row = self._row(connection, number)
            if row.trial_id is None:
                trial_id = self._unlinked_trial(storage, number) if interrupted else None
                try:
                    trial_id = trials.create(storage, self.optuna_study_id, row) if trial_id is None else trial_id
                    self._write(connection, number, trial_id=trial_id)
                except StudyError as error:
                    refused = error
                    self._write(connection, number, origin="", **dict.fromkeys(slot_rows.VECTOR))
                row = self._row(connection, number)
        if refused is not None:
            raise refused
        return trials.slot_from_row(row)

    def _unlinked_trial(self, storage: RDBStorage, number: int) -> int | None:
        waiting = trials.unfinished(storage, self.optuna_study_id)
        return next((t._trial_id for t in waiting if t.user_attrs.get(trials.SLOT_ATTR) == number), None)

    def _commit_result(self, connection: Connection, result: Slot, attrs: dict[str, Any]) -> None:
        self._write(
            connection,
            result.number,
            state=result.state,
            losses=None if result.losses is None else result.losses.tolist(),
            loss_nats=result.loss_nats,
            nll_nats=result.nll_nats,
            tokens=result.tokens,
            seconds=result.seconds,
            achieved=result.achieved,
            worker=result.worker,
            error=result.error,
            attrs=attrs,
            lease_expires_at=None,
            finished_at=func.now(),
        )

    def _tell(self, number: int) -> None:
        storage = self._storage()
        with self._fence.transaction() as connection:
            row = self._row(connection, number)
            trials.tell(storage, trials.slot_from_row(row), row.attrs or {})
        self._untold.discard(number)

    def _ensure_optuna_study(self) -> int:
        storage = self._storage()
        with self._fence.transaction() as connection:
            known = connection.execute(
                select(study_table.c.optuna_study_id).where(study_table.c.id == self._study_id)
            ).scalar()
            return optuna_study.ensure(connection, storage, self._study_id, self.name, known)

    def _storage(self) -> RDBStorage:
        return self._database.optuna_storage()

    def _row(self, connection: Connection, number: int) -> Row[Any]:
        return slot_rows.read(connection, self._study_id, number)

    def _write(self, connection: Connection, number: int, **values: Any) -> None:
        slot_rows.write(connection, self._study_id, number, **values)


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
