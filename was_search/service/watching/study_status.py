"""Shows where a study stands, once or again and again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from was_search.errors import ConfigError, TransientError
from was_search.service.context import Context
from was_search.service.reports.status import status_line, status_rows
from was_search.studies.overview import overview, to_json

if TYPE_CHECKING:
    from was_storage.studies.store import StudyRecord


def status(context: Context, name: str = "", *, gpu_price: float | None = None) -> StudyRecord | None:
    """State of the study ``name``, or of the newest one; None if there is none.

    Args:
        context: its database holds the studies.
        name: the study's.
        gpu_price: price of a GPU hour, which adds a cost.

    Raises:
        StudyError: no study has this name.
        ConfigError: a negative price.
    """
    from was_storage.studies.overview import read_snapshot
    from was_storage.studies.store import StudyStore

    _check_price(gpu_price)
    name = name or _newest(context)
    if not name:
        return None
    snapshot = read_snapshot(context.database, name)
    found = overview(snapshot)
    context.reporter.table("Status", ["", ""], status_rows(snapshot, found, gpu_price))
    context.reporter.result(to_json(snapshot, found, gpu_price))
    return StudyStore(context.database).get(name)


def watch(context: Context, name: str = "", *, seconds: float = 2.0, gpu_price: float | None = None) -> None:
    """Show the state every ``seconds`` until interrupted; a restart of the database is waited for.

    Raises:
        StudyError: no study has this name.
        ConfigError: an interval below 0.1 s, or a negative price.
    """
    from was_storage.studies.overview import read_snapshot

    _check_price(gpu_price)
    if not 0.1 <= seconds <= 86400:
        raise ConfigError(f"every: must be from 0.1 to 86400 seconds, got {seconds:g}")
    name = name or _newest(context)
    if not name:
        return
    try:
        with context.reporter.live() as show:
            while True:
                try:
                    snapshot = read_snapshot(context.database, name)
                except TransientError as error:
                    show("Status", [["study", name], ["database", str(error)]], f"{name}: {error}")
                else:
                    found = overview(snapshot)
                    rows = status_rows(snapshot, found, gpu_price)
                    show(f"Status at {snapshot.now:%H:%M:%S}", rows, status_line(snapshot, found))
                    context.reporter.result(to_json(snapshot, found, gpu_price))
                time.sleep(seconds)
    except KeyboardInterrupt:
        return


def _newest(context: Context) -> str:
    """The newest study's name, "" after a note where there is none."""
    from was_storage.studies.store import StudyStore

    found = StudyStore(context.database).list()
    if not found:
        context.reporter.note("no studies yet; start one with 'was-search run' or 'was-search demo'")
        context.reporter.result({"studies": []})
        return ""
    return max(found, key=lambda record: record.created_at).name


def _check_price(gpu_price: float | None) -> None:
    if gpu_price is not None and not 0 <= gpu_price < float("inf"):
        raise ConfigError(f"gpu_price: must be a number and not negative, got {gpu_price!r}")
