"""Step 5: figures of a plan or of the dense model on any data, and tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.evaluation import show_evaluations, show_tasks
from was_search.service.token_sets import tokens_here
from was_search.texts.protocol import Evaluation, EvaluationProtocol
from was_search.weight_format import AS_STORED, canonical

if TYPE_CHECKING:
    from torch import nn

    from was_search.checkpoints.structure import Structure
    from was_search.service.steps.tasks import TaskResult


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
        context: its settings give model, data, device and dtype.
        plan: the plan to evaluate; None: the dense model alone.
        split: split of the data.
        weights: formats of the weights to compare, in the order of the result. If there are none, the settings' format
            counts, preceded by weights as stored if it is a rounded one. A plan's thresholds are the same for all
            formats: with a format that it was not made for, figures show what it loses there.

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
        results.append(_evaluate(context, plan, split, gpus, name))
    show_evaluations(context.reporter, results, plan)
    return results


def _evaluate(context: Context, plan: Plan | None, split: str, gpus: int, weights: str) -> PlanEvaluation:
    from was_kernels.pass_ops import ops_for
    from was_search.masks.evaluation import evaluate_thresholds
    from was_search.masks.finite import require_finite
    from was_search.masks.masked_model import MaskedModel, structure_norms

    settings = context.settings
    settings.require("model", "data")
    context.model.require_positions(settings.sequence_length)
    data = tokens_here(context, split, weights)
    loaded, structure = load_for(context, plan, gpus, weights=weights)
    score = plan.score if plan is not None else settings.score
    ops = ops_for(context.placement_here.device)
    model = MaskedModel(loaded, structure, structure_norms(structure, score), ops)
    runs = [None] if plan is None else [None, plan.thresholds]
    found = []
    with context.reporter.phase(f"evaluate on {data.protocol.brief()}", len(runs)) as advance:
        for thresholds in runs:
            found.append(evaluate_thresholds(model, data, thresholds))
            if thresholds is None:
                name, dtype = context.model.source.display_name, context.placement_here.dtype
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
    from was_search.checkpoints.load import load_tokenizer
    from was_search.service.steps.tasks import check_tasks, evaluate_tasks

    options: dict[str, Any] = {
        "limit": limit,
        "batch_size": context.settings.batch_size,
        "include_path": include_path,
    }
    check_tasks(tasks, **options)
    model, _ = load_for(context, plan, gpus)
    tokenizer = load_tokenizer(context.model.source)
    options["seed"] = context.settings.seed
    with context.reporter.phase(f"dense model on {', '.join(tasks)}"):
        results = {"dense": evaluate_tasks(model, tokenizer, tasks, **options)}
    if plan is not None:
        # Likelihoods are taken over whole texts: a plan that leaves prompts dense would be the dense model there.
        everywhere = replace(plan, prefill="masked")
        with (
            context.reporter.phase(f"plan on {', '.join(tasks)}"),
            sparsify(model, everywhere, dense_above=None) as sparse,
        ):
            results["plan"] = evaluate_tasks(sparse, tokenizer, tasks, **options)
    show_tasks(context.reporter, results, limit)
    return results


def load_for(context: Context, plan: Plan | None, gpus: int = 1, *, weights: str = "") -> tuple[nn.Module, Structure]:
    """The settings' model with its structure, in this process; refused if ``plan`` is for another model.

    Its blocks are spread over ``gpus`` GPUs. Its weights are of the format ``weights``, whatever the plan was made
    for; where none is given they are as the settings say, and a plan for another format is refused.
    """
    from was_search.checkpoints.load import load_model
    from was_search.checkpoints.structure import find_structure

    if plan is not None:
        columns = context.model.source.columns
        plan.require_model(context.model.fingerprint if columns is None else columns.fingerprint, plan.shape)
        if not weights:
            plan.require_weights(context.settings.weights)
    placement, weights = context.placement_here, weights or context.settings.weights
    where = placement.device if gpus == 1 else f"{gpus} GPUs"
    form = "" if weights == AS_STORED else f", weights {weights}"
    with context.reporter.phase(f"load the model on {where}, {placement.dtype}{form}"):
        model = load_model(
            context.model.source, dtype=placement.dtype, device=placement.device, weights=weights, gpus=gpus
        )
        structure = find_structure(model, context.settings.masks if plan is None else plan.shape.masks)
    if plan is not None:
        plan.require_shape(structure.shape)
    return model, structure
