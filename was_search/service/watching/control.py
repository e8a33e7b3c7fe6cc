"""Asks something of a study while it runs, or before its next run."""

from __future__ import annotations

from was_search.errors import ConfigError
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.studies.control import Control, Overrides, Wish

_RUNNING = {
    Wish.RUN: "goes on",
    Wish.PAUSE: "hands nothing out any more; what is in flight ends, and its workers stay",
    Wish.DRAIN: "lets what is in flight end and then ends itself; the same command goes on with the study",
    Wish.CANCEL: "puts back what is in flight and ends; the same command goes on with the study",
}
_NOT_RUNNING = {
    Wish.RUN: "its next run hands out as usual",
    Wish.PAUSE: "its next run will hand nothing out before 'was-search resume'",
    Wish.DRAIN: "there is nothing to drain",
    Wish.CANCEL: "there is nothing to cancel",
}


def ask(context: Context, study: str, wish: Wish) -> Control:
    """Write ``wish`` down for the study's coordinator, which obeys within about a second; returns all that is asked.

    Raises:
        StudyError: there is no such study.
    """
    from was_storage.studies.control import ControlStore

    store = ControlStore(context.database)
    running = store.wish(study, wish)
    what = f"its coordinator {_RUNNING[wish]}" if running else f"no coordinator is running it: {_NOT_RUNNING[wish]}"
    return _said(context.reporter, study, store.read(study), running, f"{wish} of study {study} is asked for; {what}")


def change(context: Context, study: str, overrides: Overrides) -> Control:
    """Change the study's trials, workers or limits; returns all that is asked.

    Raises:
        ConfigError: nothing was given.
        StudyError: there is no such study, or it has used more slots than it would be left with.
    """
    from was_storage.studies.control import ControlStore

    if not overrides.given:
        raise ConfigError("set: nothing to change; give --trials, --workers, --patience or one of the --max- options")
    store = ControlStore(context.database)
    running = store.set(study, overrides)
    given = overrides.given.items()
    words = ", ".join(f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in given)
    what = "its coordinator obeys within about a second" if running else "it holds from the study's next run on"
    return _said(context.reporter, study, store.read(study), running, f"study {study}: {words}; {what}")


def _said(reporter: Reporter, study: str, control: Control, running: bool, words: str) -> Control:
    reporter.note(words)
    reporter.result(
        {
            "study": study,
            "wish": control.wish.value,
            "n_slots": control.n_slots,
            "overrides": control.overrides.given,
            "running": running,
        }
    )
    return control
