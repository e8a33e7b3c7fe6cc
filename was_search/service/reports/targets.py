"""The table of several targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from was_search.decode_time.profile import LatencyProfile
from was_search.service.reports.comparison import STEP_COLUMNS, narrow, step_caption, step_cells
from was_search.service.reports.distance import DISTANCE_COLUMNS, DISTANCE_MEANING, distance_cells
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import increase
from was_search.studies.slots import SlotState
from was_search.texts.protocol import perplexity

if TYPE_CHECKING:
    from was_search.service.targets.several import TargetRun


def show_targets(
    reporter: Reporter,
    runs: list[TargetRun],
    lesser: list[bool],
    protocol: str,
    unsearched: Sequence[float],
    profile: LatencyProfile | None,
) -> None:
    """Show the best of each target.

    Args:
        reporter: shows the table.
        runs: in rising order of their targets.
        lesser: for each run whether it is dominated.
        protocol: protocol of the test split, in words.
        unsearched: targets without a plan.
        profile: the profile that predicted the steps; None: none did.
    """
    timed = profile is not None
    body = []
    for each, bad in zip(runs, lesser, strict=True):
        best = each.best
        achieved = (best.calibration_achieved, best.search.achieved, best.test.achieved)
        body.append(
            [
                each.words,
                f"{100 * best.nominal:.2f}",
                " ".join(f"{100 * v:.1f}" for v in achieved),
                f"{best.search.evaluation.loss_nats:.4f}",
                f"{best.test.evaluation.loss_nats:.4f}",
                f"{perplexity(best.test.evaluation.loss_nats):.3f}",
                f"{100 * increase_on_test(each):+.2f} %",
                *distance_cells(best.test.evaluation),
                f"{best.gap_nats:+.4f}",
                narrow(best.against_uniform),
                "yes" if bad else "no",
                each.cut_short_by or "no",
                *step_cells(best.step),
            ]
        )
    dense = runs[0].dense.test.evaluation.loss_nats
    reporter.table(
        "Best of each target",
        [
            "target",
            "nomi-\nnal %",
            "achieved %\nc/s/t",
            "search\nnats",
            "test\nnats",
            "test\nppl",
            "test ppl\nover dense",
            *DISTANCE_COLUMNS,
            "gap",
            "test -\nuniform",
            "domi-\nnated",
            "cut\nshort",
            *(STEP_COLUMNS if timed else ()),
        ],
        body,
        caption="\n".join(
            [
                f"dense: {dense:.4f} nats per token on the test split, perplexity {perplexity(dense):.3f}",
                "dominated: another best or uniform drops as much on the test split (to 0.1 points) and is better",
                f"{DISTANCE_MEANING}; on the test split",
                *_cut_short_words(runs, unsearched),
                protocol,
                *([] if profile is None else [step_caption(profile)]),
            ]
        ),
    )


def _cut_short_words(runs: list[TargetRun], unsearched: Sequence[float]) -> list[str]:
    lines = [
        f"cut short: {100 * run.target:g} % by {run.result.search.ending.detail}; "
        f"{run.result.search.count(SlotState.WAITING)} of {len(run.result.search.slots)} trials were never begun"
        for run in runs
        if run.cut_short_by
    ]
    if unsearched:
        names = ", ".join(asked_words(target, runs[0].by_time) for target in unsearched)
        lines.append(f"no plan, as no trial was complete when a limit ended the search: {names}")
    return lines


def increase_on_test(run: TargetRun) -> float:
    """Increase of perplexity, best over dense model, on the test split, as a fraction."""
    return increase(run.best.test.evaluation.loss_nats, run.dense.test.evaluation.loss_nats)


def asked_words(target: float, by_time: bool) -> str:
    return f"{target:g}x" if by_time else f"{100 * target:g} %"
