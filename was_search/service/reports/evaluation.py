"""The tables of perplexity and of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.masks.intervals import paired_interval
from was_search.plan import Plan
from was_search.service.reports.progress import Reporter
from was_search.texts.protocol import Evaluation, perplexity
from was_search.weight_format import brief

if TYPE_CHECKING:
    from was_search.service.steps.evaluation import PlanEvaluation
    from was_search.service.steps.tasks import TaskResult


def show_evaluations(reporter: Reporter, results: list[PlanEvaluation], plan: Plan | None) -> None:
    """Show one table of all formats; the JSON is the last format's, with all under ``weights`` if there are several."""
    several = len(results) > 1
    rows: list[list[str]] = []
    for result in results:
        suffix = f", {brief(result.weights)}" if several else ""
        against = result.dense if result is results[0] else results[0].dense
        rows.append(_row(f"dense{suffix}", 0.0, 0.0, result.dense, against))
        if plan is not None and result.sparse is not None and result.achieved is not None:
            name = f"plan ({plan.provenance.get('study', '?')}){suffix}"
            rows.append(_row(name, plan.shape.sparsity(plan.sparsities), result.achieved, result.sparse, against))
    last = results[-1]
    caption = [last.protocol.describe()]
    if several:
        caption = [results[0].protocol.describe(), "the same sequences for all formats of the weights"]
    if plan is not None and any(result.weights != plan.weights for result in results):
        caption.append(f"the plan's thresholds were calibrated for {brief(plan.weights)}")
    first = f"dense, {brief(results[0].weights)}" if several else "dense"
    reporter.table(
        f"Perplexity on the {last.protocol.split} split",
        ["", "nominal", "achieved", "nats/token", "perplexity", f"difference to {first}, 95 %"],
        rows,
        caption="\n".join(caption),
    )
    value = _json(last, plan)
    if several:
        value["weights"] = {result.weights: _json(result, plan) for result in results}
    reporter.result(value)


def _row(name: str, nominal: float, achieved: float, found: Evaluation, against: Evaluation) -> list[str]:
    gap = paired_interval(found.losses, against.losses) if found is not against and len(found.losses) > 1 else ""
    return [
        name,
        f"{100 * nominal:.2f} %",
        f"{100 * achieved:.2f} %",
        f"{found.loss_nats:.4f}",
        f"{perplexity(found.loss_nats):.3f}",
        str(gap),
    ]


def _json(result: PlanEvaluation, plan: Plan | None) -> dict[str, Any]:
    value: dict[str, Any] = {
        "protocol": result.protocol.to_json(),
        "dense": {"loss_nats": result.dense.loss_nats, "perplexity": perplexity(result.dense.loss_nats)},
    }
    if plan is not None and result.sparse is not None and result.achieved is not None:
        value["plan"] = {
            "loss_nats": result.sparse.loss_nats,
            "perplexity": perplexity(result.sparse.loss_nats),
            "nominal_sparsity": plan.shape.sparsity(plan.sparsities),
            "achieved_sparsity": result.achieved,
        }
    return value


def show_tasks(reporter: Reporter, results: Mapping[str, list[TaskResult]], limit: int | None) -> None:
    """Show figures of tasks, dense and with a plan if there is one."""
    rows = []
    for i, dense in enumerate(results["dense"]):
        row = [f"{dense.task} ({dense.metric}, n={dense.n})", _figure(dense)]
        if "plan" in results:
            row.append(_figure(results["plan"][i]))
        rows.append(row)
    caption = "lm-eval, figure ± standard error" + (f", first {limit} items of each task" if limit else "")
    columns = ["task", "dense", "plan"][: len(results) + 1]
    reporter.table("Tasks", columns, rows, caption=caption)
    reporter.result(
        {
            "tasks": {name: [{**vars(task)} for task in found] for name, found in results.items()},
            "limit": limit,
        }
    )


def _figure(result: TaskResult) -> str:
    error = "" if result.stderr is None or not np.isfinite(result.stderr) else f" ± {result.stderr:.4f}"
    return f"{result.value:.4f}{error}"
