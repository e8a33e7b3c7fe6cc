"""The table of a plan between two studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from was_search.plan import Plan
from was_search.process.plain_json import number
from was_search.service.reports.distance import DISTANCE_COLUMNS, DISTANCE_MEANING, distance_figures
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import increase, plan_gap_nats
from was_search.texts.protocol import perplexity

if TYPE_CHECKING:
    from was_search.service.targets.interpolation import Neighbour


def show_interpolated(
    reporter: Reporter, plan: Plan, below: Neighbour, above: Neighbour, folder: Path, protocols: list[str]
) -> None:
    """Show a plan between two studies; ``protocols`` describe the search and the test split."""
    metrics, dense = plan.metrics, plan.metrics["dense"]
    rows = []
    for name, figures in (("dense", dense), ("interpolated", metrics)):
        search, test = (number(figures[split]["loss_nats"]) for split in ("search", "test"))
        more = increase(test, number(dense["test"]["loss_nats"]))
        sparse = name != "dense"
        rows.append(
            [
                name,
                f"{100 * plan.budget:.2f}" if sparse else "0.00",
                " ".join(f"{100 * (plan.achieved[s] if sparse else 0.0):.1f}" for s in plan.achieved),
                f"{search:.4f}",
                f"{test:.4f}",
                f"{perplexity(test):.3f}",
                f"{100 * more:+.2f} %" if sparse else "",
                *distance_figures(figures["test"]),
            ]
        )
    reporter.table(
        "Interpolated, not searched",
        [
            "",
            "nomi-\nnal %",
            "achieved %\nc/s/t",
            "search\nnats",
            "test\nnats",
            "test\nppl",
            "test ppl\nover dense",
            *DISTANCE_COLUMNS,
        ],
        rows,
        caption="\n".join([f"{DISTANCE_MEANING}; on the test split", *protocols]),
    )
    reporter.note(
        f"interpolated between {below.study} ({100 * below.target:g} %, slot {below.slot.number}) and "
        f"{above.study} ({100 * above.target:g} %, slot {above.slot.number}), not searched"
    )
    reporter.result(
        {
            "interpolated": plan.provenance["interpolated"],
            "searched": False,
            "metrics": metrics,
            "achieved": plan.achieved,
            "gap_nats": plan_gap_nats(plan),
            "plan": str(folder),
        }
    )
