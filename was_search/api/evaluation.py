"""Step 5: figures of a plan or of the dense model on any data, and tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.api.context import Context
from was_search.plan import Plan
from was_search.protocol import Evaluation, EvaluationProtocol, perplexity
from was_search.statistics import paired_interval
from was_search.weight_format import AS_STORED, brief, canonical

if TYPE_CHECKING:
    from torch import nn

    from was_search.structure import Structure
    from was_search.tasks import TaskResult


@dataclass(frozen=True)
class PlanEvaluation:
    """The dense model and, if there is a plan, the plan on the same sequences.

    ``weights`` is the format of the model's weights; the protocol has it too.
    """

    protocol: EvaluationProtocol
    dense: Evaluation
    sparse: Evaluation | None
    achieved: float | None

    @property
    def weights(self) -> str:
        return self.protocol.weights


def evaluate(
    context: Context, plan: Plan | None, split: str = "test", weights: Sequence[str] = (), *, gpus: int = 1
) -> list[PlanEvaluation]:
    """Perplexity of the dense model and of ``plan`` on ``split`` of the settings' data, in this process.

    Args:
        context: settings: model, data, device and dtype.
        plan: None: the dense model alone.
        split: of the data.
        weights: formats of the weights to compare, in the order of the result; none: those of the settings, and as
            stored before them if these are rounded. A plan's thresholds are the same for all: those of a format that
            it was not made for show what it loses there.

    Raises:
        PlanError: the plan belongs to another model.
        ModelError: the dense model's loss is not finite.
        ConfigError: an unknown format, or sequences longer than the model's positions.
        ResourceError: fewer than ``gpus`` GPUs, or they are too small.
    """
    settings = context.settings
    wanted = [canonical(name) for name in weights] or list(dict.fromkeys((AS_STORED, settings.weights)))
    results = []
    for name in dict.fromkeys(wanted):
        results.append(_evaluate(context.rounded(name), plan, split, gpus))
    _show(context, results, plan)
    return results


def _evaluate(context: Context, plan: Plan | None, split: str, gpus: int) -> PlanEvaluation:
    from was_kernels.ops import ops_for
    from was_search.evaluation import evaluate_thresholds
    from was_search.finite import require_finite
    from was_search.masked_model import MaskedModel, structure_norms

    settings = context.settings
    settings.require("model", "data")
    context.require_positions()
    data = context.tokens_uncached(split)
    loaded, structure = load_for(context, plan, gpus, any_weights=True)
    score = plan.score if plan is not None else settings.score
    ops = ops_for(context.placement_here.device)
    model = MaskedModel(loaded, structure, structure_norms(structure, score), ops)
    runs = [None] if plan is None else [None, plan.thresholds]
    found = []
    with context.reporter.phase(f"evaluate on {data.protocol.brief()}", len(runs)) as advance:
        for thresholds in runs:
            found.append(evaluate_thresholds(model, data, thresholds))
            if thresholds is None:
                name, dtype = context.source.display_name, context.placement_here.dtype
                require_finite(found[0].losses, "loss of the dense model", loaded, name, dtype)
            advance()
    return PlanEvaluation(
        data.protocol,
        found[0],
        found[1] if plan is not None else None,
        structure.shape.sparsity(found[1].achieved) if plan is not None else None,
    )


def evaluate_on_tasks(
    context: Context,
    plan: Plan | None,
    tasks: list[str],
    *,
    limit: int | None,
    include_path: Path | None,
    gpus: int = 1,
) -> dict[str, list[TaskResult]]:
    """lm-eval ``tasks`` for the dense model and for ``plan``, side by side: results by ``dense`` and ``plan``."""
    from was_kernels import sparsify
    from was_search.model import load_tokenizer
    from was_search.tasks import check_tasks, evaluate_tasks

    options: dict[str, Any] = {
        "limit": limit,
        "batch_size": context.settings.batch_size,
        "include_path": include_path,
    }
    check_tasks(tasks, **options)
    model, _ = load_for(context, plan, gpus)
    tokenizer = load_tokenizer(context.source)
    options["seed"] = context.settings.seed
    with context.reporter.phase(f"dense model on {', '.join(tasks)}"):
        results = {"dense": evaluate_tasks(model, tokenizer, tasks, **options)}
    if plan is not None:
        # Likelihoods are of whole texts: a plan that leaves prompts dense would be the dense model there.
        everywhere = replace(plan, prefill="masked")
        with (
            context.reporter.phase(f"plan on {', '.join(tasks)}"),
            sparsify(model, everywhere, dense_above=None) as sparse,
        ):
            results["plan"] = evaluate_tasks(sparse, tokenizer, tasks, **options)
    _show_tasks(context, results, limit)
    return results


def load_for(
    context: Context, plan: Plan | None, gpus: int = 1, *, any_weights: bool = False
) -> tuple[nn.Module, Structure]:
    """The model of the settings with its structure, in this process; refused if ``plan`` is for another.

    Its blocks are spread over ``gpus`` GPUs. A plan for weights of another format is refused too, unless
    ``any_weights``.
    """
    from was_search.model import load_model
    from was_search.structure import find_structure

    if plan is not None:
        columns = context.source.columns
        plan.require_model(context.fingerprint if columns is None else columns.fingerprint, plan.shape)
        if not any_weights:
            plan.require_weights(context.settings.weights)
    placement, weights = context.placement_here, context.settings.weights
    where = placement.device if gpus == 1 else f"{gpus} GPUs"
    form = "" if weights == AS_STORED else f", weights {weights}"
    with context.reporter.phase(f"load the model on {where}, {placement.dtype}{form}"):
        model = load_model(context.source, dtype=placement.dtype, device=placement.device, weights=weights, gpus=gpus)
        structure = find_structure(model, context.settings.masks if plan is None else plan.shape.masks)
    if plan is not None:
        plan.require_shape(structure.shape)
    return model, structure


def _show(context: Context, results: list[PlanEvaluation], plan: Plan | None) -> None:
    """One table of all formats; the JSON is the last one's, with all under ``weights`` if there are several."""
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
    context.reporter.table(
        f"Perplexity on the {last.protocol.split} split",
        ["", "nominal", "achieved", "nats/token", "perplexity", f"difference to {first}, 95 %"],
        rows,
        caption="\n".join(caption),
    )
    value = _json(last, plan)
    if several:
        value["weights"] = {result.weights: _json(result, plan) for result in results}
    context.reporter.result(value)


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
