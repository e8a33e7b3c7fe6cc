"""Step 3: the study. Slots in Postgres, vectors from Optuna, evaluations on the workers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from was_search.coordinator.search_progress import SearchProgress
from was_search.process import logs
from was_search.process.signals import draining
from was_search.service.context import Context
from was_search.service.reports.metrics import served
from was_search.service.reports.page import tally
from was_search.service.steps.dense_predictions import check_vocabulary
from was_search.service.steps.pages import study_page
from was_search.service.steps.question import Question
from was_search.service.steps.seeding import seed
from was_search.service.steps.study_identity import identity, require_name, search_descent_options
from was_search.service.steps.warm_start import warm_seeds
from was_search.service.watching.live_page import LivePage, kept_fresh
from was_search.service.watching.notify import announced
from was_search.service.watching.run_record import elsewhere, over_already, recorded
from was_search.studies.control import LAST_SLOT, TOGETHER, Ending, EndingKind, limits_of
from was_search.studies.slots import Slot, SlotState, best_slot
from was_search.vectors.descent import chain_steps
from was_search.vectors.seeds import Seed

if TYPE_CHECKING:
    from was_search.coordinator.descents import DescentPlan


@dataclass(frozen=True)
class SearchResult:
    """A study's slots after a search.

    ``drained`` says that the search was interrupted and has slots left, ``ending`` how it ended.
    """

    study: str
    slots: list[Slot]
    seeds: list[Seed]
    question: Question
    drained: bool
    ending: Ending = LAST_SLOT

    @property
    def best(self) -> Slot | None:
        return best_slot(self.slots)

    def count(self, state: SlotState) -> int:
        return sum(slot.state is state for slot in self.slots)


def search(context: Context, question: Question | None = None) -> SearchResult:
    """Create or resume the study and run it until its last slot, a rule, or somebody ends it; ctrl-C drains it.

    ``question`` is that of the settings, unless one is given.

    Raises:
        StudyError: the study exists with another model, target or data, or has a live coordinator.
        ConfigError: ``kl_top_k`` is above the vocabulary.
    """
    question = question or Question.of(context)
    with announced(context, question.settings.study) as announcement:
        found = _search(context, question)
        announcement.study, announcement.slots, announcement.ending = found.study, found.slots, found.ending
        return found


def _search(context: Context, question: Question) -> SearchResult:
    settings = question.settings
    settings.require_one_target()
    if settings.fitness == "kl":
        check_vocabulary(question.model, settings.kl_top_k)
    question.check_target(context.reporter)
    warm = warm_seeds(context, question)  # refused before anything is calibrated
    mine = identity(question)  # what model or data lack is said before a database is opened
    name = require_name(context.database, question, mine)
    if context.announcement is not None:
        context.announcement.study = name
    with logs.bound(study=name):
        return _search_named(context, question, warm, name, mine)


def _search_named(
    context: Context, question: Question, warm: list[Seed], name: str, mine: dict[str, Any]
) -> SearchResult:
    from was_storage.studies.control import ControlStore
    from was_storage.studies.store import StudyStore

    settings, together = question.settings, question.together
    asked_since = ControlStore(context.database).now()
    calibration = question.calibration
    seeds = seed(context, question, warm)
    store = StudyStore(context.database)
    record = store.open_or_create(
        name,
        identity=mine,
        config={**settings.to_json(), **({TOGETHER: sorted(together)} if together else {})},
        shape=calibration.shape.to_json(),
        n_slots=settings.trials,
    )
    point = question.dense.point(seeds[-1].sparsities, "the Fisher seed")
    data = question.tokens.search
    started = time.perf_counter()
    with store.coordinate(name) as session, draining() as drain:
        slots = session.slots()
        ending = over_already(context.database, session, slots, limits=limits_of(vars(settings)), together=together)
        if ending is not None:
            result = SearchResult(name, slots, seeds, question, drained=False, ending=ending)
            words = tally(slots, len(slots)) + (f"; {ending}" if ending.detail else "")
            context.reporter.cached("search", f"study {name}, {words}", time.perf_counter() - started)
            return result

        from was_search.coordinator.loop import SearchLoop
        from was_search.coordinator.options import SearchOptions

        options = SearchOptions(
            budget=question.budget,
            latency=question.latency,
            sampler=settings.sampler,
            space=settings.space,
            radius=settings.radius,
            seed=settings.seed,
            early_stopping=settings.early_stopping,
            significance=settings.significance,
            rung_keep=settings.rung_keep,
            lag=settings.sampler_lag,
            trial_timeout=settings.trial_timeout,
            max_attempts=settings.max_attempts,
            descents=descent_plan(question),
            limits=limits_of(vars(settings)),
            elsewhere=elsewhere(context.database, together, name),
        )
        top = question.dense.top
        pool = context.pool
        page = LivePage(session, study_page(name, seeds, question), slots, record.report)
        with (
            recorded(context, session, asked_since) as run,
            kept_fresh(page, run) as refresher,
            context.reporter.search(name, data.protocol.describe(), settings.fitness) as show,
            served(settings.metrics, name) as measure,
        ):

            def progress(state: SearchProgress) -> None:
                show(state)
                measure(state)
                if page.update(state):
                    refresher.changed()

            loop = SearchLoop(
                session,
                pool,
                data,
                point.histograms,
                shape=calibration.shape,
                seeds=seeds,
                options=options,
                top=top,
                drain=drain,
                run_control=run.control,
                progress=progress,
            )
            slots = loop.run()
            run.ending = loop.ending
    result = SearchResult(name, slots, seeds, question, drained=loop.ending.interrupted, ending=loop.ending)
    if loop.ending.kind is EndingKind.STOPPED:
        context.reporter.note(f"search {loop.ending}; {result.count(SlotState.WAITING)} trial(s) were never begun")
    return result


def descent_plan(question: Question) -> DescentPlan | None:
    """The search's descents as the settings say, None if there are none."""
    from was_search.coordinator.descents import DescentPlan

    settings = question.settings
    if not settings.descent_epochs:
        return None
    return DescentPlan(
        epochs=settings.descent_epochs,
        steps=chain_steps(settings.descent_chains),
        options=search_descent_options(settings),
        per_round=settings.descent_sequences,
        data=question.tokens.slopes,
    )
