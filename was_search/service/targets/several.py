"""Several targets in one run: a study each on the same workers, warm-started in a row, and what they trade off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.errors import ConfigError, StudyError
from was_search.service.context import Context
from was_search.service.reports.distance import distance_words
from was_search.service.reports.study_report import interval_json
from was_search.service.reports.targets import asked_words, increase_on_test, show_targets
from was_search.service.settings import Settings
from was_search.service.steps.comparison import Row
from was_search.service.steps.main_job import RunResult, run
from was_search.service.steps.question import Question
from was_search.service.steps.study_identity import identity, require_name, study_name
from was_search.service.targets.pareto import Point, dominated, pareto_figure
from was_search.service.token_sets import TokenSets
from was_search.service.watching.run_record import elsewhere
from was_search.studies.control import EndingKind, Tally, limits_of
from was_search.studies.names import folder_name
from was_search.studies.slots import SlotState
from was_search.texts.protocol import content_hash, perplexity

if TYPE_CHECKING:
    from was_storage.server.database import Database


@dataclass(frozen=True)
class TargetRun:
    """One target's run; its rows are dense, uniform, further seeds and, last, the best.

    ``target`` is a sparsity, or with ``by_time`` a speed-up.
    """

    target: float
    result: RunResult
    by_time: bool = False

    @property
    def words(self) -> str:
        """The target in words."""
        return asked_words(self.target, self.by_time)

    @property
    def study(self) -> str:
        return self.result.search.study

    @property
    def dense(self) -> Row:
        return self.result.rows[0]

    @property
    def uniform(self) -> Row:
        return self.result.rows[1]

    @property
    def best(self) -> Row:
        return self.result.rows[-1]

    @property
    def cut_short_by(self) -> str:
        """The rule that ended its search before the last trial, "" if none did."""
        ending = self.result.search.ending
        return ending.detail.split(":")[0] if ending.kind is EndingKind.STOPPED else ""


@dataclass(frozen=True)
class TargetsResult:
    """The targets that were run; ``drained`` says that the last one was interrupted and is not among them.

    ``unsearched`` are the targets without a complete trial, as a limit was met before.
    """

    runs: list[TargetRun]
    pareto: Path | None
    drained: bool
    unsearched: tuple[float, ...] = ()


class DrainedError(Exception):
    """A target's study was interrupted."""


def run_targets(context: Context) -> TargetsResult:
    """A study for each of the settings' targets or speed-ups, in rising order, each warm-started from the last one.

    ``max_seconds`` and ``max_gpu_seconds`` are for all of them together: what one leaves the next ones have, and once
    they are spent, what has a complete trial is exported and nothing more is searched.

    Raises:
        ConfigError: no targets are set.
        StudyError: the limit was met before any trial was complete.
    """
    by_time = bool(context.settings.speedups)
    targets = context.settings.speedups or context.settings.budgets
    if not targets:
        raise ConfigError("targets: missing; give --targets with several budgets, or --target-speedups")
    asked = Question.of(context)
    for target in targets:  # what is out of reach is said before anything is run
        asked.at(target, by_time=by_time).check_target(context.reporter)
    questions = _questions(asked, targets, by_time=by_time)
    identities = [identity(each) for each in questions]
    for each, mine in zip(questions, identities, strict=True):
        require_name(context.database, each, mine)
    runs: list[TargetRun] = []
    unsearched: list[float] = []
    for number, (target, each) in enumerate(zip(targets, questions, strict=True), 1):
        context.reporter.note(f"\ntarget {asked_words(target, by_time)} ({number} of {len(targets)})")
        try:
            done = run_at(context, each)
        except DrainedError:
            return TargetsResult(runs, None, drained=True)
        if done is None:
            unsearched.append(target)
        else:
            runs.append(done)
    if not runs:
        raise nothing_complete()
    return TargetsResult(
        runs, report_targets(context, asked, runs, unsearched), drained=False, unsearched=tuple(unsearched)
    )


def _questions(asked: Question, targets: tuple[float, ...], *, by_time: bool) -> list[Question]:
    """A question for each target, each with the names of all studies.

    So what any of them has spent counts, also in a resumed command.
    """
    found: list[Question] = []
    names: list[str] = []
    for target in targets:
        before = names[-1] if names else asked.settings.warm_start
        found.append(one_of_several(asked, target, before, by_time=by_time))
        names.append(study_name(found[-1]))
    return [replace(each, together=frozenset(names)) for each in found]


def one_of_several(asked: Question, target: float, warm_start: str, *, by_time: bool = False) -> Question:
    """The question of one of several targets, which share what is known of the dense model."""
    settings = asked.settings
    label = f"{target:g}x" if by_time else f"{100 * target:g}"
    return asked.at(
        target,
        by_time=by_time,
        study=f"{settings.study}-{label}" if settings.study else "",
        warm_start=warm_start,
        plan=str(Path(settings.plan) / label) if settings.plan else "",
    )


def run_at(context: Context, question: Question) -> TargetRun | None:
    """All steps for one of several targets; None if the command's limit on time leaves it without a complete trial.

    Raises:
        DrainedError: it was interrupted.
    """
    from was_storage.studies.store import StudyStore

    settings, name = question.settings, study_name(question)
    known = {record.name: record for record in StudyStore(context.database).list()}
    if (name not in known or known[name].best_loss_nats is None) and (
        rule := time_is_up(context.database, settings, question.together, name)
    ):
        context.reporter.note(f"not searched; {rule}")
        return None
    result = run(context, question)
    if result.search.drained:
        raise DrainedError
    if result.plan is None:
        return None
    by_time = bool(settings.target_speedup)
    return TargetRun(settings.target_speedup if by_time else settings.target, result, by_time)


def time_is_up(database: Database, settings: Settings, together: frozenset[str], study: str) -> str:
    """The limit on time that all studies of the command have met together, in words; "" if none."""
    from was_storage.studies.control import ControlStore

    spent = ControlStore(database).spent({study})
    return limits_of(vars(settings)).met(spent, Tally(), elsewhere(database, together, study))


def nothing_complete() -> StudyError:
    """The error where a limit on time left no target with a complete trial."""
    return StudyError("no target has a complete trial yet: raise the limit that ended the search, and run it again")


def report_targets(context: Context, asked: Question, runs: list[TargetRun], unsearched: Sequence[float] = ()) -> Path:
    """The Pareto table, and its plot as a file and on the page of each study; returns the file.

    The ``unsearched`` targets, which have no plan, are named below the table.
    """
    from was_storage.dashboard.study_page import annotate

    runs = sorted(runs, key=lambda run: run.target)
    points = [_point("best", run, run.best) for run in runs]
    points += [_point("uniform", run, run.uniform) for run in runs]
    lesser = dominated(points)[: len(runs)]
    protocol = asked.tokens.test.protocol.describe()
    timed = all(each.best.step is not None for each in runs)
    show_targets(
        context.reporter, runs, lesser, protocol, unsearched, runs[0].result.search.question.latency if timed else None
    )
    dense = perplexity(runs[0].dense.test.evaluation.loss_nats)
    figure = pareto_figure(points, dense, protocol)
    path = _folder(asked, runs) / "pareto.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise ConfigError(f"plan: cannot write {path} ({error.strerror}); choose another folder") from error
    for each in runs:
        annotate(context.database, each.study, note=None, figures={"pareto": figure})
    context.reporter.note(f"plot: {path}")
    context.reporter.result(
        {
            "pareto": str(path),
            "protocol": asked.tokens.test.protocol.to_json(),
            "targets": [_json(asked.tokens, run, bad) for run, bad in zip(runs, lesser, strict=True)],
            "unsearched": list(unsearched),
        }
    )
    return path


def _point(method: str, run: TargetRun, row: Row) -> Point:
    loss = row.test.evaluation.loss_nats
    predicted_ms = None if row.step is None else row.step["predicted_ms"]
    distance = row.test.evaluation.distance
    words = distance_words({} if distance is None else distance.to_json())
    return Point(method, run.target, row.test.achieved, perplexity(loss), run.words, predicted_ms, words)


def _folder(asked: Question, runs: list[TargetRun]) -> Path:
    settings = asked.settings
    if settings.plan:
        return Path(settings.plan)
    if settings.study:
        return Path("was-runs") / folder_name(settings.study)
    return Path("was-runs") / f"{asked.model.label}-targets-{content_hash([run.study for run in runs])[:8]}"


def _json(tokens: TokenSets, run: TargetRun, bad: bool) -> dict[str, Any]:
    best = run.best
    return {
        "target": None if run.by_time else run.target,
        **({"target_speedup": run.target} if run.by_time else {}),
        **({} if best.step is None else {"step": best.step}),
        "study": run.study,
        "plan": str(run.result.plan),
        "nominal_sparsity": best.nominal,
        "achieved_on_calibration": best.calibration_achieved,
        "search": best.search.to_json(tokens),
        "test": best.test.to_json(tokens),
        "test_increase": increase_on_test(run),
        "gap_nats": best.gap_nats,
        "test_against_uniform": interval_json(best.against_uniform),
        "dominated": bad,
        "ending": str(run.result.search.ending),
        "trials_never_begun": run.result.search.count(SlotState.WAITING),
    }
