"""Tell a webhook how a run of a study ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from was_search.errors import WasError
from was_search.process.plain_json import finite
from was_search.process.redaction import redacted
from was_search.process.signals import Terminated
from was_search.service.context import Context
from was_search.service.reports.webhook import post
from was_search.studies.control import LAST_SLOT, Ending, EndingKind
from was_search.studies.slots import Slot, SlotState, best_slot
from was_search.texts.protocol import perplexity


@dataclass
class Announcement:
    """The known facts of the run so far; a step fills them in."""

    study: str = ""
    slots: Sequence[Slot] = ()
    ending: Ending = LAST_SLOT


@contextmanager
def announced(context: Context, study: str | None = None) -> Iterator[Announcement]:
    """Post how the block ended to the settings' ``notify``; inside another such block only the outer one posts.

    ``study`` is what the run's study is called; None: as the settings say.

    A block that raises has failed, and its error goes on.
    """
    if context.announcement is not None:
        yield context.announcement
        return
    context.announcement = announcement = Announcement(context.settings.study if study is None else study)
    try:
        yield announcement
    except BaseException as error:
        _send(context.settings.notify, announcement, Ending(EndingKind.FAILED, failure_words(error)))
        raise
    else:
        _send(context.settings.notify, announcement, announcement.ending)
    finally:
        context.announcement = None


def failure_words(error: BaseException) -> str:
    """One line on an error, fit for others' eyes."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return str(error) if isinstance(error, Terminated) else "ended by a signal"
    if not isinstance(error, WasError):
        return type(error).__name__  # its words are not meant for users
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])


def payload(announcement: Announcement, ending: Ending) -> dict[str, Any]:
    """The JSON to post; ``text`` is the line that chat services show."""
    slots = list(announcement.slots)
    best = best_slot(slots)
    nll = None if best is None else best.nll_nats
    counts = {state.value: sum(slot.state is state for slot in slots) for state in SlotState}
    done = sum(n for state, n in counts.items() if SlotState(state).finished)
    event = EndingKind.FINISHED if ending.kind is EndingKind.STOPPED else ending.kind
    shown = f", perplexity {perplexity(nll):.3f}" if nll is not None else ""
    return {
        "event": event.value,
        "study": announcement.study,
        "detail": ending.detail,
        "best_slot": best.number if best else None,
        "best_loss_nats": best.loss_nats if best else None,
        "best_perplexity": finite(perplexity(nll)) if nll is not None else None,
        "slots": {"total": len(slots), **counts},
        "text": f"was-search {announcement.study or 'run'} {ending}; {done} of {len(slots)} trials{shown}",
    }


def _send(url: str, announcement: Announcement, ending: Ending) -> None:
    """Post it to ``url``; nothing where there is none."""
    if url:
        post(url, payload(announcement, ending))
