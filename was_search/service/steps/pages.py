"""A study's page in optuna-dashboard: made of its question, and written once more when its plan has been exported."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from was_search.service.reports.page import StudyPage
from was_search.service.steps.question import Question
from was_search.service.steps.seeding import sensitivity
from was_search.vectors.seeds import Seed

if TYPE_CHECKING:
    from was_storage.server.database import Database


def study_page(study: str, seeds: list[Seed], question: Question) -> StudyPage:
    """The page of ``study``, made of what does not change while it runs."""
    settings = question.settings
    return StudyPage(
        study=study,
        target=question.budget.flat,
        fitness=settings.fitness,
        kl_top_k=settings.kl_top_k,
        protocol=question.tokens.search.protocol.describe(),
        seeds={seed.name: seed.levels for seed in seeds},
        sensitivity=sensitivity(question),
        settings=settings.to_json(),
        latency=question.latency,
    )


def report_study(database: Database, study: str, seeds: list[Seed], question: Question) -> None:
    """Write the page of a study that has been exported; a coordinator that runs it does so itself."""
    from was_search.studies.overview import overview
    from was_storage.dashboard.study_page import show_idle
    from was_storage.studies.overview import read_snapshot
    from was_storage.studies.store import StudyStore

    snapshot = read_snapshot(database, study)
    found = overview(snapshot)
    play = f"{found.play}: {found.play_detail}" if found.play_detail else found.play
    slots = StudyStore(database).slots(study)
    page = study_page(study, seeds, question)
    note = page.note(slots, len(slots), play, snapshot.report, datetime.now(UTC))
    show_idle(database, study, note, page.figures(slots))
