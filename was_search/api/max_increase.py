"""The highest sparsity whose increase of perplexity over the dense model stays inside a limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from was_search.api.context import Context
from was_search.api.study import study_name
from was_search.api.targets import (
    DrainedError,
    TargetRun,
    increase_on_test,
    nothing_complete,
    report_targets,
    run_at,
    sibling,
)
from was_search.bracket import Bracket, BracketEnd, Probe, find_highest
from was_search.errors import ConfigError
from was_search.report import increase
from was_search.statistics import paired_interval
from was_search.targets import HIGHEST_TARGET, LOWEST_TARGET


@dataclass(frozen=True)
class MaxIncreaseResult:
    """The probes, in the order in which they were made, and the run of the one that is the answer.

    Attributes:
        bracket: what the probes say; None if the run was interrupted.
        runs: one a probe.
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
    runs: list[TargetRun] = []

    def probe(target: float) -> float:
        nearest = min(runs, key=lambda run: abs(run.target - target), default=None)
        context.reporter.note(f"\nprobe {len(runs) + 1}: target {100 * target:g} %")
        warm_start = nearest.study if nearest else settings.warm_start
        at = sibling(context, target, warm_start)
        # A resumed command repeats its probes in their order: those before this one are all that have spent anything.
        at.together = frozenset([*(run.study for run in runs), study_name(at)])
        done = run_at(at)
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
    pareto = report_targets(context, runs)
    _report(context, bracket, answer)
    return MaxIncreaseResult(bracket, runs, answer, pareto)


def increase_on_search(run: TargetRun) -> float:
    """Perplexity of the exported plan over the dense model's on the whole search split, less 1."""
    return increase(run.best.search.evaluation.loss_nats, run.dense.search.evaluation.loss_nats)


def conclusion(bracket: Bracket) -> str:
    """One sentence on what the probes found out about the limit."""
    limit = f"the limit of {100 * bracket.limit:g} %"
    inside, outside = bracket.inside, bracket.outside
    if inside is None:
        assert outside is not None
        return (
            f"even the lowest target tried, {100 * outside.target:g} %, is outside {limit}: "
            f"{100 * outside.increase:+.2f} %; allow more, or search with more trials"
        )
    answer = f"target {100 * inside.target:g} % is inside {limit}: {100 * inside.increase:+.2f} % on the search split"
    if outside is None:
        highest = bracket.ending is BracketEnd.ALL_INSIDE
        return f"{answer}; {'that is the highest target tried for' if highest else 'nothing higher was tried'}"
    beyond = f"{100 * outside.target:g} % is outside: {100 * outside.increase:+.2f} %"
    if bracket.ending is BracketEnd.CLOSED:
        return f"{answer}; {beyond}"
    width = 100 * (outside.target - inside.target)
    return f"{answer}; {beyond}; after {len(bracket.probes)} probes {width:.1f} points between them are left open"


def _report(context: Context, bracket: Bracket, answer: TargetRun | None) -> None:
    context.reporter.note(f"\n{conclusion(bracket)}")
    value = {
        "limit": bracket.limit,
        "ending": bracket.ending.value,
        "conclusion": conclusion(bracket),
        "probes": [vars(probe) for probe in bracket.probes],
        "target": None,
    }
    if answer is not None:
        on_test = increase_on_test(answer)
        losses, dense = answer.best.test.evaluation.losses, answer.dense.test.evaluation.losses
        interval = paired_interval(losses, dense) if len(losses) > 1 else None
        spread = (
            f" (95 % interval {100 * increase(interval.low, 0.0):+.2f} to {100 * increase(interval.high, 0.0):+.2f} %)"
            if interval
            else ""
        )
        side = "inside the limit too" if on_test <= bracket.limit else "outside the limit there"
        context.reporter.note(f"on the test split it is {100 * on_test:+.2f} %{spread}, {side}")
        context.reporter.note(f"achieved sparsity there: {100 * answer.best.test.achieved:.2f} %")
        value |= {
            "target": answer.target,
            "study": answer.study,
            "plan": str(answer.result.plan),
            "search_increase": increase_on_search(answer),
            "test_increase": on_test,
            "achieved_sparsity": answer.best.test.achieved,
        }
    context.reporter.result(value)
