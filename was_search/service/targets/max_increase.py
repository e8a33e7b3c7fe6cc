"""The highest sparsity whose increase of perplexity over the dense model stays inside a limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from was_search.errors import ConfigError
from was_search.service.asked import HIGHEST_TARGET, LOWEST_TARGET
from was_search.service.context import Context
from was_search.service.reports.max_increase import increase_on_search, show_bracket
from was_search.service.steps.question import Question
from was_search.service.steps.study_identity import study_name
from was_search.service.targets.several import (
    DrainedError,
    TargetRun,
    nothing_complete,
    one_of_several,
    report_targets,
    run_at,
)
from was_search.vectors.bracket import Bracket, BracketEnd, Probe, find_highest


@dataclass(frozen=True)
class MaxIncreaseResult:
    """The probes, in the order in which they were made, and the run of the one that is the answer.

    Attributes:
        bracket: what the probes say; None if the run was interrupted.
        runs: one for each probe.
        answer: the highest probe inside; None if none is.
        pareto: plot of the probes.
    """

    bracket: Bracket | None
    runs: list[TargetRun]
    answer: TargetRun | None
    pareto: Path | None

    @property
    def drained(self) -> bool:
        return self.bracket is None


class _TimeIsUpError(Exception):
    """The command's limit on time left a probe without a complete trial."""


def run_max_increase(context: Context) -> MaxIncreaseResult:
    """Probe targets, a study each, until the highest one inside the settings' limit is bracketed.

    What decides is the exported plan of each study: the winner re-calibrated at its own point, on all sequences of
    the search split. The answer is a probe, so exactly what was asked of it was measured. ``max_seconds`` and
    ``max_gpu_seconds`` are for all probes together.

    Raises:
        ConfigError: no limit is set.
        StudyError: the limit on time was met before any trial was complete.
    """
    settings = context.settings
    limit = settings.increase_limit
    if limit is None:
        raise ConfigError("max_ppl_increase: missing; give --max-ppl-increase with a limit such as 5%")
    asked, runs = Question.of(context), list[TargetRun]()

    def probe(target: float) -> float:
        nearest = min(runs, key=lambda run: abs(run.target - target), default=None)
        context.reporter.note(f"\nprobe {len(runs) + 1}: target {100 * target:g} %")
        warm_start = nearest.study if nearest else settings.warm_start
        at = one_of_several(asked, target, warm_start)
        # A resumed command repeats its probes in their order, so only those before this one have spent anything.
        together = frozenset([*(run.study for run in runs), study_name(at)])
        done = run_at(context, replace(at, together=together))
        if done is None:
            raise _TimeIsUpError
        runs.append(done)
        found = increase_on_search(done)
        side = "inside" if found <= limit else "outside"
        context.reporter.note(
            f"target {100 * target:g} %: perplexity {100 * found:+.2f} % over dense on the search split, "
            f"{side} the limit of {100 * limit:g} %"
        )
        return found

    try:
        bracket = find_highest(probe, limit, start=settings.target, lowest=LOWEST_TARGET, highest=HIGHEST_TARGET)
    except DrainedError:
        return MaxIncreaseResult(None, runs, None, None)
    except _TimeIsUpError:
        if not runs:
            raise nothing_complete() from None
        bracket = Bracket(limit, tuple(Probe(run.target, increase_on_search(run)) for run in runs), BracketEnd.CUT)
    inside = bracket.inside
    answer = None if inside is None else next(run for run in runs if run.target == inside.target)
    pareto = report_targets(context, asked, runs)
    show_bracket(context.reporter, bracket, answer)
    return MaxIncreaseResult(bracket, runs, answer, pareto)
