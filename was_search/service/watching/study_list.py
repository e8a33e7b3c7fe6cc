"""Lists studies, deletes them, and serves optuna-dashboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from was_search.service.asked import target_words
from was_search.service.context import Context
from was_search.studies.fitness import fitness_of

if TYPE_CHECKING:
    from was_storage.studies.store import StudyRecord


def studies(context: Context) -> list[StudyRecord]:
    """All studies of the database, shown as a table."""
    from was_storage.studies.store import StudyStore

    found = StudyStore(context.database).list()
    rows = []
    for record in found:
        done = sum(n for state, n in record.counts.items() if state.finished)
        rows.append(
            [
                record.name,
                target_words(record.identity),
                f"{done}/{record.n_slots}",
                fitness_of(record.identity),
                "" if record.best_loss_nats is None else f"{record.best_loss_nats:.4f}",
                f"{record.created_at:%Y-%m-%d %H:%M}",
            ]
        )
    columns = ["study", "target", "trials", "fitness", "best nats (search split)", "created"]
    context.reporter.table(f"Studies in {context.database.display_url}", columns, rows)
    context.reporter.result({"studies": [_summary(record) for record in found]})
    return found


def delete(context: Context, study: str, agreed: Callable[[str], bool]) -> bool:
    """Delete a study, its trials, its plan and its page; returns whether that was done.

    ``agreed`` is asked first, with what would be deleted in words. Cached artifacts, which other studies may share,
    and plans in folders stay.

    Raises:
        StudyError: there is no such study, or a coordinator is running it.
    """
    from was_storage.studies.store import StudyStore

    store = StudyStore(context.database)
    record = store.require_idle(study)
    finished = sum(n for state, n in record.counts.items() if state.finished)
    best = "" if record.best_loss_nats is None else f", best {record.best_loss_nats:.4f} nats on the search split"
    words = f"study {study} of {context.database.display_url}: {finished} of {record.n_slots} trials finished{best}"
    deleted = agreed(words)
    if deleted:
        store.delete(study)
        context.reporter.note(f"deleted: {words}; plans in folders and what is cached stay")
    else:
        context.reporter.note(f"nothing was deleted; study {study} stays")
    context.reporter.result({"deleted": deleted, **_summary(record)})
    return deleted


def dashboard(
    context: Context,
    *,
    study: str = "",
    host: str = "127.0.0.1",
    port: int = 8080,
    allow_hosts: Sequence[str] = (),
    allow_edits: bool = False,
) -> None:
    """Serve optuna-dashboard until interrupted; the embedded Postgres lives as long.

    Its connections can only read, unless ``allow_edits``: whoever reaches the page could delete studies. It answers
    under localhost, ``host``, numeric addresses and the names in ``allow_hosts`` only.

    Raises:
        StudyError: there is no study of the given name.
        ResourceError: the port is taken.
        ConfigError: one of ``allow_hosts`` is no host's name.
    """
    from was_storage.dashboard.app import serve
    from was_storage.studies.store import StudyStore

    page = f"studies/{StudyStore(context.database).get(study).optuna_study_id}" if study else ""

    def say(url: str) -> None:
        context.reporter.note(f"optuna-dashboard on {url}/{page} (ctrl-C ends it)")

    with nullcontext(context.database) if allow_edits else context.database.read_only() as database:
        serve(database, host=host, port=port, allow_hosts=allow_hosts, listening=say)


def _summary(record: StudyRecord) -> dict[str, object]:
    return {
        "study": record.name,
        "n_slots": record.n_slots,
        "counts": {state.value: n for state, n in record.counts.items()},
        "fitness": fitness_of(record.identity),
        "best_loss_nats": record.best_loss_nats,
        "identity": record.identity,
        "report": record.report,
    }
