"""The main job: all steps in their order, skipping what is cached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.plan import Plan, require_writable
from was_search.process import logs
from was_search.service.context import Context
from was_search.service.reports.comparison import show_comparison
from was_search.service.steps.budgets import budget_title
from was_search.service.steps.comparison import Row, compare
from was_search.service.steps.exporting import plans_folder, write_plan
from was_search.service.steps.pages import report_study
from was_search.service.steps.question import Question
from was_search.service.steps.study import SearchResult, search
from was_search.service.watching.notify import announced
from was_search.studies.control import EndingKind
from was_search.texts.protocol import SPLITS

if TYPE_CHECKING:
    from was_storage.server.database import Database


@dataclass(frozen=True)
class RunResult:
    """What ``run`` made: the search, the plan's folder and the comparison.

    There is no plan where the search was interrupted, or, with several targets, ended by a limit before its first
    complete trial.
    """

    search: SearchResult
    plan: Path | None
    rows: list[Row]


def run(context: Context, question: Question | None = None) -> RunResult:
    """Calibrate, seed, search, export and compare; an interrupted search ends the run after its report.

    ``question`` is that of the settings, unless one is given.
    """
    question = question or Question.of(context)
    tokens = question.tokens
    require_writable(plans_folder(question.settings))  # a plan is written once all has been done
    with announced(context, question.settings.study):
        found = search(context, question)
        if found.drained or (question.together and found.best is None and found.ending.kind is EndingKind.STOPPED):
            # Of several targets, the others are exported.
            return RunResult(found, None, [])
        with logs.bound(study=found.study):
            folder = write_plan(context, found)
            rows = compare(found, Plan.load(folder))
        timed = all(row.step is not None for row in rows)
        show_comparison(
            context.reporter,
            rows,
            budget_title(question.settings),
            found.question.latency if timed else None,
            {split: tokens.of(split).protocol.describe() for split in SPLITS},
        )
        values = [row.to_json(tokens) for row in rows]
        _remember(context.database, found, values)
        context.reporter.result({"study": found.study, "plan": str(folder), "rows": values})
        return RunResult(found, folder, rows)


def _remember(database: Database, found: SearchResult, rows: list[dict[str, Any]]) -> None:
    """Add the comparison to the study's report and note."""
    from was_storage.studies.store import StudyStore

    store = StudyStore(database)
    store.set_report(found.study, {**store.get(found.study).report, "comparison": rows})
    report_study(database, found.study, found.seeds, found.question)
