"""A search's run as others see it: what was asked of it before, and how it went, in the database."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from was_search.errors import WasError
from was_search.process.logs import event
from was_search.service.context import Context
from was_search.service.watching.notify import failure_words
from was_search.studies.control import LAST_SLOT, Ending, EndingKind, Limits, Spent, Tally, Wish
from was_search.studies.slots import Slot

if TYPE_CHECKING:
    from was_storage.server.database import Database
    from was_storage.studies.control import ControlSession
    from was_storage.studies.session import CoordinatorSession

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is being recorded; ``ending`` is to be set at its end."""

    control: ControlSession
    ending: Ending


def over_already(
    database: Database, session: CoordinatorSession, slots: list[Slot], *, limits: Limits, together: frozenset[str]
) -> Ending | None:
    """How the study has ended already: all slots have finished, or a limit is met; None if it has not.

    Args:
        database: has what was spent.
        session: the coordinator's session.
        slots: the study's.
        limits: those of the settings, which others may have changed since.
        together: studies of the command, which share its limits on time.
    """
    from was_storage.studies.control import ControlSession

    if all(slot.state.finished for slot in slots):
        return LAST_SLOT
    control = ControlSession(database, session)
    overrides = control.read().overrides
    shared = overrides.shared(elsewhere(database, together, session.name))
    rule = overrides.limits(limits).met(control.spent_before(), Tally.of(slots), shared)
    return Ending(EndingKind.STOPPED, rule) if rule else None


def elsewhere(database: Database, together: frozenset[str], study: str) -> Spent:
    """What the other studies of the command have spent of its limits on time."""
    from was_storage.studies.control import ControlStore

    return ControlStore(database).spent(together - {study})


@contextmanager
def recorded(context: Context, session: CoordinatorSession, asked_since: datetime) -> Iterator[Run]:
    """Begin a run and write down how the block ends.

    Args:
        context: gives the database, the size of workers and the reporter.
        session: the coordinator's session.
        asked_since: the database's time when the command began; what was asked before it does not count.
    """
    from was_storage.studies.control import ControlSession

    control = ControlSession(context.database, session)
    before = control.open(gpus_per_worker=context.placement.gpus_per_worker, asked_since=asked_since)
    standing = control.read().wish
    if before.ends and standing is Wish.RUN:
        words = {Wish.DRAIN: "drained", Wish.CANCEL: "cancelled"}[before]
        context.reporter.note(f"study {session.name} was {words}; it goes on")
    elif standing is Wish.PAUSE:
        context.reporter.note(f"study {session.name} is paused; 'was-search resume {session.name}' lets it go on")
    run = Run(control, LAST_SLOT)
    event(_logger, "search begun", study=session.name, epoch=session.epoch)
    try:
        yield run
    except BaseException as error:
        event(_logger, "search failed", logging.ERROR, study=session.name, error=failure_words(error))
        with suppress(WasError):  # the first error is the one to report; status sees a coordinator that went away
            control.close(Ending(EndingKind.FAILED, failure_words(error)))
        raise
    control.close(run.ending)
    event(_logger, "search ended", study=session.name, ending=str(run.ending))
