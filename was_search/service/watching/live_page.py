"""A study's page in optuna-dashboard, kept fresh while the search runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from was_search.coordinator.search_progress import SearchProgress
from was_search.errors import StudyError
from was_search.process.refresher import Refresher
from was_search.service.reports.page import StudyPage
from was_search.service.watching.notify import failure_words
from was_search.service.watching.run_record import Run
from was_search.studies.control import Ending, EndingKind
from was_search.studies.slots import Slot

if TYPE_CHECKING:
    from was_storage.studies.session import CoordinatorSession

_LAST_PATIENCE_SECONDS = 20.0
"""Time for the database to come back before a run's last page is given up."""

_logger = logging.getLogger(__name__)


class LivePage:
    """The page of a study that this process coordinates.

    Reads only slots that have finished since the last time. Everything is written under the coordinator's epoch, so
    one that was replaced changes nothing. :meth:`update` is called by the search's thread, :meth:`write` by another.

    Args:
        session: the coordinator's session.
        page: what does not change.
        slots: the study's, as the run finds them.
        report: the study's.
    """

    def __init__(
        self, session: CoordinatorSession, page: StudyPage, slots: list[Slot], report: dict[str, object]
    ) -> None:
        self._session = session
        self._page = page
        self._slots = {slot.number: slot for slot in slots if slot.state.finished}
        self._total = len(slots)
        self._report = report
        self.play = "starting"

    def update(self, progress: SearchProgress) -> bool:
        """Take in how the search goes; returns whether there is anything new to show."""
        counts = ", ".join(f"{n} {state}" for state, n in progress.pool.counts.items() if n)
        activity = progress.activity or "running"
        play = f"{activity}, workers: {counts}" if counts else activity
        new = progress.current is not None or play != self.play or progress.total != self._total
        self.play, self._total = play, progress.total
        return new

    def write(self) -> None:
        """Bring the page up to date.

        Raises:
            StudyError: another coordinator has taken over.
            TransientError: the connection was lost.
        """
        latest = max((s.finished_at for s in self._slots.values() if s.finished_at is not None), default=None)
        self._slots.update((slot.number, slot) for slot in self._session.finished_since(latest))
        slots = list(self._slots.values())
        figures = self._page.figures(slots)
        self._session.show(self._page.note(slots, self._total, self.play, self._report, datetime.now(UTC)), figures)

    def write_last(self, ending: Ending) -> None:
        """Bring the page up to date at the end of the run; a failure is logged and changes nothing."""
        from was_search.coordinator.durable import durable

        self.play = str(ending)
        try:
            durable(self, patience_seconds=_LAST_PATIENCE_SECONDS).write()
        except StudyError:
            return  # the study was taken over or deleted: the page is not ours any more
        except Exception as error:
            _logger.warning("the study's page in optuna-dashboard could not be finished: %s", error)


@contextmanager
def kept_fresh(live: LivePage, run: Run, *, least_seconds: float = 15.0, share: float = 0.01) -> Iterator[Refresher]:
    """Keep the page fresh during the block, and write down how it ends: as ``run`` says then, or with its error."""
    what = "the study's page in optuna-dashboard"
    with Refresher(live.write, what, least_seconds=least_seconds, share=share) as refresher:
        try:
            yield refresher
        except BaseException as error:
            refresher.close()
            live.write_last(Ending(EndingKind.FAILED, failure_words(error)))
            raise
    live.write_last(run.ending)
