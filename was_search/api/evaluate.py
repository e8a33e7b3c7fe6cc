"""Step 5: figures of a plan or of the dense model on any data, and tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.api.context import Context
from was_search.plan import Plan
from was_search.protocol import Evaluation, EvaluationProtocol, perplexity
from was_search.statistics import paired_interval

if TYPE_CHECKING:
    from torch import nn

    from was_search.structure import Structure
    from was_search.tasks import TaskResult


@dataclass(frozen=True)
class PlanEvaluation:
    """The dense model and, if there is a plan, the plan on the same sequences."""

    protocol: EvaluationProtocol
    dense: Evaluation
    sparse: Evaluation | None
    achieved: float | None


def evaluate(context: Context, plan: Plan | None, split: str = "test") -> PlanEvaluation:
    """Perplexity of the dense model and of ``plan`` on ``split`` of the settings' data, in this process.

    Raises:
        PlanError: the plan belongs to another model.
    """
    from was_kernels.ops import ops_for
    from was_search.evaluation import evaluate_thresholds
    from was_search.masking import structure_norms

    settings = context.settings
    data = context.tokens_uncached(split)
    model, structure = load_for(context, plan)
    score = plan.score if plan is not None else settings.score
    norms = structure_norms(structure, score)
    runs = [None] if plan is None else [None, plan.thresholds]
    found = []
    with context.reporter.phase(f"evaluate on {data.protocol.brief()}", len(runs)) as advance:
        for thresholds in runs:
            op = ops_for(context.placement_here.device).mask
            found.append(evaluate_thresholds(model, structure, norms, data, thresholds, mask_op=op))
            advance()
    result = PlanEvaluation(
        data.protocol,
        found[0],
        found[1] if plan is not None else None,
        structure.shape.sparsity(found[1].achieved) if plan is not None else None,
    )
    _show(context, result, plan)
    return result


def evaluate_on_tasks(
    context: Context, plan: Plan | None, tasks: list[str], *, limit: int | None, include_path: Path | None
) -> dict[str, list[TaskResult]]:
    """lm-eval ``tasks`` for the dense model and for ``plan``, side by side: results by ``dense`` and ``plan``."""
    from was_kernels import sparsify
    from was_search.model import load_tokenizer
    from was_search.tasks import evaluate_tasks

    model, _ = load_for(context, plan)
    tokenizer = load_tokenizer(context.source)
    options: dict[str, Any] = {
        "limit": limit,
        "batch_size": context.settings.batch_size,
        "include_path": include_path,
        "seed": context.settings.seed,
    }
    with context.reporter.phase(f"dense model on {', '.join(tasks)}"):
        results = {"dense": evaluate_tasks(model, tokenizer, tasks, **options)}
    if plan is not None:
        with context.reporter.phase(f"plan on {', '.join(tasks)}"), sparsify(model, plan) as sparse:
            results["plan"] = evaluate_tasks(sparse, tokenizer, tasks, **options)
    _show_tasks(context, results, limit)
    return results


def load_for(context: Context, plan: Plan | None) -> tuple[nn.Module, Structure]:
    """The model of the settings with its structure, in this process; refused if ``plan`` is for another."""
    from was_search.model import load_model
    from was_search.structure import find_structure

    if plan is not None:
        columns = context.source.columns
        plan.require_model(context.fingerprint if columns is None else columns.fingerprint, plan.shape)
    placement = context.placement_here
    with context.reporter.phase(f"load the model on {placement.device}, {placement.dtype}"):
        model = load_model(context.source, dtype=placement.dtype, device=placement.device)
        structure = find_structure(model, context.settings.masks if plan is None else plan.shape.masks)
    if plan is not None:
        plan.require_shape(structure.shape)
    return model, structure


def _show(context: Context, result: PlanEvaluation, plan: Plan | None) -> None:
    value: dict[str, Any] = {
        "protocol": result.protocol.to_json(),
        "dense": {"loss_nats": result.dense.loss_nats, "perplexity": perplexity(result.dense.loss_nats)},
    }
    rows = [
        [
            "dense",
            "0.00 %",
            "0.00 %",
            f"{result.dense.loss_nats:.4f}",
            f"{perplexity(result.dense.loss_nats):.3f}",
            "",
        ]
    ]
    if plan is not None and result.sparse is not None and result.achieved is not None:
        gap = paired_interval(result.sparse.losses, result.dense.losses) if len(result.sparse.losses) > 1 else None
        value["plan"] = {
            "loss_nats": result.sparse.loss_nats,
            "perplexity": perplexity(result.sparse.loss_nats),
            "nominal_sparsity": plan.shape.sparsity(plan.sparsities),
            "achieved_sparsity": result.achieved,
        }
        rows.append(
            [
                f"plan ({plan.provenance.get('study', '?')})"
                + (", shared masks" if plan.shape.masks == "shared" else ""),
                f"{100 * plan.shape.sparsity(plan.sparsities):.2f} %",
                f"{100 * result.achieved:.2f} %",
                f"{result.sparse.loss_nats:.4f}",
                f"{perplexity(result.sparse.loss_nats):.3f}",
                str(gap) if gap else "",
            ]
        )
    context.reporter.table(
        f"Perplexity on the {result.protocol.split} split",
        ["", "nominal", "achieved", "nats/token", "perplexity", "plan - dense, 95 %"],
        rows,
        caption=result.protocol.describe(),
    )
    context.reporter.result(value)


def _show_tasks(context: Context, results: Mapping[str, list[TaskResult]], limit: int | None) -> None:
    rows = []
    for i, dense in enumerate(results["dense"]):
        row = [f"{dense.task} ({dense.metric}, n={dense.n})", _figure(dense)]
        if "plan" in results:
            row.append(_figure(results["plan"][i]))
        rows.append(row)
    caption = "lm-eval, figure ± standard error" + (f", first {limit} items of each task" if limit else "")
    columns = ["task", "dense", "plan"][: len(results) + 1]
    context.reporter.table("Tasks", columns, rows, caption=caption)
    context.reporter.result(
        {
            "tasks": {name: [{**vars(task)} for task in found] for name, found in results.items()},
            "limit": limit,
        }
    )


def _figure(result: TaskResult) -> str:
    error = "" if result.stderr is None or not np.isfinite(result.stderr) else f" ± {result.stderr:.4f}"
    return f"{result.value:.4f}{error}"
