"""Look at studies: the list, one study's state, and optuna-dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from was_search.api.context import Context
from was_search.fitness import fitness_of, fitness_words
from was_search.protocol import EvaluationProtocol
from was_search.slots import SlotState, best_slot

if TYPE_CHECKING:
    from was_storage.studies import StudyRecord


def studies(context: Context) -> list[StudyRecord]:
    """All studies of the database, shown as a table."""
    from was_storage.studies import StudyStore

    found = StudyStore(context.database).list()
    rows = []
    for record in found:
        done = sum(n for state, n in record.counts.items() if state.finished)
        rows.append(
            [
                record.name,
                f"{100 * float(record.identity.get('target', 0)):g} %",
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


def status(context: Context, name: str = "") -> StudyRecord | None:
    """State of the study ``name``, or of the newest one; None if there is none.

    Raises:
        StudyError: no study has this name.
    """
    from was_storage.studies import StudyStore

    store = StudyStore(context.database)
    if not name:
        found = store.list()
        if not found:
            context.reporter.note("no studies yet; start one with 'was-search run' or 'was-search demo'")
            context.reporter.result({"studies": []})
            return None
        name = max(found, key=lambda record: record.created_at).name
    record = store.get(name)
    counts = ", ".join(f"{record.counts.get(state, 0)} {state.value}" for state in SlotState)
    fitness, slot = fitness_of(record.identity), best_slot(store.slots(name))
    best = (
        "no complete trial yet"
        if slot is None or slot.loss_nats is None
        else fitness_words(fitness, slot.loss_nats, slot.nll_nats)
    )
    rows = [
        ["study", record.name],
        ["trials", f"{record.n_slots}: {counts}"],
        ["target", f"{100 * float(record.identity.get('target', 0)):g} % of the seven projections' weights"],
        ["fitness", str(record.identity.get("fitness", fitness))],
        ["best", best],
        [
            "on",
            EvaluationProtocol.from_json(record.identity["search data"]).describe(),
        ],
        ["exported", str(record.report.get("exported", {}).get("candidate", "not yet"))],
    ]
    context.reporter.table("Status", ["", ""], rows)
    context.reporter.result(_summary(record))
    return record


def dashboard(
    context: Context, *, study: str = "", host: str = "127.0.0.1", port: int = 8080, allow_edits: bool = False
) -> None:
    """Serve optuna-dashboard until interrupted; the embedded Postgres lives as long.

    Its connections can only read, unless ``allow_edits``: whoever reaches the page could delete studies.

    Raises:
        StudyError: there is no study of the given name.
        ResourceError: the port is taken.
    """
    from was_storage.dashboard import serve
    from was_storage.studies import StudyStore

    store_url = f"http://{host}:{port}/dashboard/"
    if study:
        store_url += f"studies/{StudyStore(context.database).get(study).optuna_study_id}"
    context.reporter.note(f"optuna-dashboard on {store_url} (ctrl-C ends it)")
    if allow_edits:
        serve(context.database, host=host, port=port)
        return
    with context.database.read_only() as database:
        serve(database, host=host, port=port)


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
