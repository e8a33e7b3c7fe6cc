"""The table and conclusion of probing for the highest target within a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from was_search.masks.intervals import paired_interval
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import increase
from was_search.service.reports.targets import increase_on_test
from was_search.vectors.bracket import Bracket, BracketEnd

if TYPE_CHECKING:
    from was_search.service.targets.several import TargetRun


def increase_on_search(run: TargetRun) -> float:
    """Perplexity of the exported plan over the dense model's on the whole search split, less 1."""
    return increase(run.best.search.evaluation.loss_nats, run.dense.search.evaluation.loss_nats)


def show_bracket(reporter: Reporter, bracket: Bracket, answer: TargetRun | None) -> None:
    """Show the answer, how well it does on the test split, and what is left open."""
    reporter.note(f"\n{conclusion(bracket)}")
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
        reporter.note(f"on the test split it is {100 * on_test:+.2f} %{spread}, {side}")
        reporter.note(f"achieved sparsity there: {100 * answer.best.test.achieved:.2f} %")
        value |= {
            "target": answer.target,
            "study": answer.study,
            "plan": str(answer.result.plan),
            "search_increase": increase_on_search(answer),
            "test_increase": on_test,
            "achieved_sparsity": answer.best.test.achieved,
        }
    reporter.result(value)


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
