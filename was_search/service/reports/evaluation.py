"""The tables of perplexity, of two plans beside each other, and of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.masks.intervals import paired_interval
from was_search.plan import Plan
from was_search.service.reports.distance import DISTANCE_COLUMNS, DISTANCE_MEANING, distance_cells
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import interval_json
from was_search.texts.protocol import Evaluation, perplexity
from was_search.weight_format import brief

if TYPE_CHECKING:
    from was_search.service.steps.evaluation import Comparison, PlanEvaluation
    from was_search.service.steps.tasks import TaskResult


_OF_A_FORMAT = "flips and TV are from the dense model with weights of the same format"


def show_evaluations(reporter: Reporter, results: list[PlanEvaluation], plan: Plan | None) -> None:
    """Show one table of all formats; the JSON is the last format's, with all under ``weights`` if there are several."""
    several = len(results) > 1
    rows: list[list[str]] = []
    for result in results:
        suffix = f", {brief(result.weights)}" if several else ""
        against = result.dense if result is results[0] else results[0].dense
        rows.append(_row(f"dense{suffix}", result.dense, against))
        if plan is not None:
            rows.append(_plan_row(f"plan ({plan.provenance.get('study', '?')}){suffix}", plan, result, against))
    last = results[-1]
    caption = [last.protocol.describe()]
    if several:
        caption = [results[0].protocol.describe(), "the same sequences for all formats of the weights"]
    if plan is not None:
        caption.append(DISTANCE_MEANING)
    if plan is not None and several:
        caption.append(_OF_A_FORMAT)
    if plan is not None and any(result.weights != plan.weights for result in results):
        caption.append(f"the plan's thresholds were calibrated for {brief(plan.weights)}")
    first = f"dense, {brief(results[0].weights)}" if several else "dense"
    _table(reporter, last, rows, first, caption)
    for result in results:
        _note_continuations(reporter, "plan", result)
    value = _json(last, plan)
    if several:
        value["weights"] = {result.weights: _json(result, plan) for result in results}
    reporter.result(value)


def show_against(reporter: Reporter, found: Comparison, plan: Plan, against: Plan) -> None:
    """Show two plans beside the dense model, and the difference between them with its test."""
    pairs = (("plan", plan, found.plan), ("against", against, found.against))
    several = found.plan.weights != found.against.weights
    base, rows, caption = found.plan.dense, list[list[str]](), [found.plan.protocol.describe()]
    for name, each, result in pairs:
        suffix = f", {brief(result.weights)}" if several else ""
        if several or not rows:
            rows.append(_row(f"dense{suffix}", result.dense, base))
        rows.append(_plan_row(f"{name} ({each.provenance.get('study', '?')}){suffix}", each, result, base))
    if several:
        caption.append(f"the same sequences for both formats of the weights; {_OF_A_FORMAT}")
    if found.plan.dense_prefix != found.against.dense_prefix:
        prefixes = f"{found.plan.dense_prefix} and {found.against.dense_prefix}"
        caption.append(f"each plan under its own dense prefix, {prefixes} token(s)")
    caption += [
        f"the thresholds of {name} were calibrated for {brief(each.weights)}"
        for name, each, result in pairs
        if each.weights != result.weights
    ]
    first = f"dense, {brief(found.plan.weights)}" if several else "dense"
    _table(reporter, found.plan, rows, first, [*caption, DISTANCE_MEANING])
    for name, _, result in pairs:
        _note_continuations(reporter, name, result)
    reporter.note(_difference_words(found))
    value = _json(found.plan, plan)
    other = _json(found.against, against)
    value["against"] = other["plan"]
    if several:
        value["against_dense"] = other["dense"]
    value["difference"] = interval_json(found.difference)
    value["p_value"] = found.p_value
    reporter.result(value)


def _difference_words(found: Comparison) -> str:
    if found.difference is None or found.p_value is None:
        return "plan - against: one sequence makes no interval; give more with --test-sequences"
    n = len(found.plan.dense.losses)
    return (
        f"plan - against: {found.difference} nats per token (95 % interval, paired over {n} sequences; negative: plan "
        f"is better), p = {found.p_value:.2g} (paired t-test, two-sided)"
    )


def _note_continuations(reporter: Reporter, name: str, result: PlanEvaluation) -> None:
    if result.continuations is not None:
        reporter.note(f"{name}: {result.continuations}")


def _table(
    reporter: Reporter, result: PlanEvaluation, rows: list[list[str]], first: str, caption: Sequence[str]
) -> None:
    difference = f"difference to\n{first}, 95 %"
    reporter.table(
        f"Perplexity on the {result.protocol.split} split",
        ["", "nominal", "achieved", "nats/token", "perplexity", *DISTANCE_COLUMNS, difference],
        rows,
        caption="\n".join(caption),
    )


def _plan_row(name: str, plan: Plan, result: PlanEvaluation, against: Evaluation) -> list[str]:
    assert result.sparse is not None and result.achieved is not None
    return _row(name, result.sparse, against, plan.shape.sparsity(plan.sparsities), result.achieved)


def _row(name: str, found: Evaluation, against: Evaluation, nominal: float = 0.0, achieved: float = 0.0) -> list[str]:
    gap = paired_interval(found.losses, against.losses) if found is not against and len(found.losses) > 1 else ""
    return [
        name,
        f"{100 * nominal:.2f} %",
        f"{100 * achieved:.2f} %",
        f"{found.loss_nats:.4f}",
        f"{perplexity(found.loss_nats):.3f}",
        *distance_cells(found),
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
            **({} if result.sparse.distance is None else result.sparse.distance.to_json()),
            "nominal_sparsity": plan.shape.sparsity(plan.sparsities),
            "achieved_sparsity": result.achieved,
            **({} if result.continuations is None else {"continuations": result.continuations.to_json()}),
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
