"""Step 5: figures of a plan or of the dense model on any data, and tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.errors import ConfigError
from was_search.masks.intervals import Interval, paired_interval, paired_p_value
from was_search.masks.masking import Masking
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.evaluation import show_against, show_evaluations, show_tasks
from was_search.service.token_sets import tokens_here
from was_search.texts.protocol import Evaluation, EvaluationProtocol
from was_search.weight_format import AS_STORED, canonical

if TYPE_CHECKING:
    from torch import nn

    from was_search.checkpoints.structure import Structure
    from was_search.masks.masked_model import MaskedModel
    from was_search.service.steps.continuations import Continuations
    from was_search.service.steps.tasks import TaskResult
    from was_search.shape import IntArray


@dataclass(frozen=True)
class PlanEvaluation:
    """The dense model and, if there is a plan, the plan on the same sequences.

    ``weights`` is the format of the model's weights; the protocol has it too. ``dense_prefix`` is what the plan's masks
    left alone, whatever the protocol says of others.
    """

    protocol: EvaluationProtocol
    dense: Evaluation
    sparse: Evaluation | None = None
    achieved: float | None = None
    dense_prefix: int | None = None
    continuations: Continuations | None = None

    @property
    def weights(self) -> str:
        return self.protocol.weights


@dataclass(frozen=True)
class Comparison:
    """Two plans of one model on the same sequences, ``plan`` less ``against``.

    Attributes:
        difference: of their losses, paired by sequence; None for a single sequence, like ``p_value``.
        p_value: of the paired t-test that the losses do not differ.
    """

    plan: PlanEvaluation
    against: PlanEvaluation
    difference: Interval | None
    p_value: float | None


def evaluate(
    context: Context,
    plan: Plan | None,
    split: str = "test",
    weights: Sequence[str] = (),
    *,
    gpus: int = 1,
    continuations: int = 0,
) -> list[PlanEvaluation]:
    """Perplexity of the dense model and of ``plan`` on ``split`` of the settings' data, in this process.

    Also how far the plan's predictions are from those of the dense model, with weights of the same format.

    Args:
        context: its settings give model, data, device and dtype.
        plan: the plan to evaluate; None: the dense model alone.
        split: split of the data.
        weights: formats of the weights to compare, in the order of the result. If there are none, the settings' format
            counts, preceded by weights as stored if it is a rounded one. A plan's thresholds are the same for all
            formats: with a format that it was not made for, figures show what it loses there.
        gpus: GPUs that the model is spread over.
        continuations: at most so many sequences whose beginnings are also continued by greedy decoding, with weights of
            the plan's own format.

    Raises:
        PlanError: the plan belongs to another model.
        ModelError: the dense model's loss is not finite.
        ConfigError: an unknown format, sequences longer than the model's positions, or continuations without a plan.
        ResourceError: fewer than ``gpus`` GPUs, or they are too small.
    """
    settings = context.settings
    plans = [] if plan is None else [plan]
    wanted = dict.fromkeys([canonical(name) for name in weights] or (AS_STORED, settings.weights))
    _require_continuations(context, continuations, plans, list(wanted))
    results = []
    for name in wanted:
        results += _evaluate(context, plans, split, gpus, name, continuations)
    show_evaluations(context.reporter, results, plan)
    return results


def evaluate_against(
    context: Context,
    plan: Plan,
    against: Plan,
    split: str = "test",
    weights: str = "",
    *,
    gpus: int = 1,
    continuations: int = 0,
) -> Comparison:
    """``plan`` and another one of the same model on the same sequences of ``split``, and whether they differ.

    Each has the dense prefix, score, masks and format of weights that it was made with, unless the settings name
    another prefix than ``plan``'s, or ``weights`` a format for both. Other arguments and errors are those of
    :func:`evaluate`.
    """
    for each in (plan, against):
        require_model(context, each)
    formats = [canonical(weights)] * 2 if weights else [plan.weights, against.weights]
    _require_continuations(context, continuations, [plan, against], formats)
    if formats[0] == formats[1]:
        first, second = _evaluate(context, [plan, against], split, gpus, formats[0], continuations)
    else:
        (first,) = _evaluate(context, [plan], split, gpus, formats[0], continuations)
        (second,) = _evaluate(context, [against], split, gpus, formats[1], continuations, beside=plan)
    assert first.sparse is not None and second.sparse is not None
    mine, theirs = first.sparse.losses, second.sparse.losses
    tested = (paired_interval(mine, theirs), paired_p_value(mine, theirs)) if len(mine) > 1 else (None, None)
    found = Comparison(first, second, *tested)
    show_against(context.reporter, found, plan, against)
    return found


def _require_continuations(context: Context, n: int, plans: Sequence[Plan], formats: Sequence[str]) -> None:
    """Refuse ``n`` continuations that could not be made or compared."""
    from was_search.service.steps.continuations import require_room

    if n < 0:
        raise ConfigError(f"continuations: must be at least 0, got {n}")
    if n == 0:
        return
    if not plans:
        raise ConfigError("continuations: are compared with the dense model's; give --plan")
    for plan in plans:
        if plan.weights not in formats:
            raise ConfigError(
                f"continuations: decoding takes weights as the plan has them; give --weights {plan.weights}"
            )
    require_room(context.model.positions, context.settings.sequence_length)


def _evaluate(
    context: Context,
    plans: Sequence[Plan],
    split: str,
    gpus: int,
    weights: str,
    continuations: int,
    *,
    beside: Plan | None = None,
) -> list[PlanEvaluation]:
    """An evaluation for each of ``plans``, one of the dense model alone if there are none.

    ``beside`` is the plan whose settings count, if it is not the first.
    """
    from was_kernels.pass_ops import ops_for
    from was_search.masks.beside_dense import evaluate_beside_dense, joined
    from was_search.masks.finite import require_finite
    from was_search.masks.masked_model import MaskedModel

    settings, first = context.settings, plans[0] if plans else None
    settings.require("model", "data")
    context.model.require_positions(settings.sequence_length)
    data = tokens_here(context, split, weights)
    loaded, _ = load_for(context, first, gpus, weights=weights)
    plans = _with_prefixes(plans, data.protocol.dense_prefix, beside or first)
    ops = ops_for(context.placement_here.device)
    models = [
        MaskedModel.of(loaded, plan.score, plan.shape.masks, ops=ops).compensated(plan.compensation) for plan in plans
    ]
    maskings = [_masking(*pair) for pair in zip(models, plans, strict=True)]
    plain = models[0] if models else MaskedModel.of(loaded, settings.score, settings.masks, ops=ops)
    batches = -(-len(data.tokens) // data.protocol.batch_size)
    with context.reporter.phase(f"evaluate on {data.protocol.brief()}", batches) as advance:
        dense, *sparse = (joined([part]) for part in evaluate_beside_dense(plain, data, maskings, advance=advance))
        name, dtype = context.model.source.display_name, context.placement_here.dtype
        require_finite(dense.losses, "loss of the dense model", loaded, name, dtype)
    if not plans:
        return [PlanEvaluation(data.protocol, dense)]
    continued = _continued(context, loaded, plans, data.tokens[:continuations], weights)
    return [
        PlanEvaluation(
            data.protocol, dense, found, plan.shape.sparsity(found.achieved), plan.dense_prefix, continuation
        )
        for plan, found, continuation in zip(plans, sparse, continued, strict=True)
    ]


def _with_prefixes(plans: Sequence[Plan], asked: int, first: Plan | None) -> list[Plan]:
    """The plans with their own dense prefixes, unless the settings ask for another one than that of the ``first``."""
    own = first is not None and first.dense_prefix == asked
    return [plan if own else replace(plan, dense_prefix=asked) for plan in plans]


def _masking(model: MaskedModel, plan: Plan) -> Masking:
    plan.require_shape(model.shape)
    return Masking(model, plan.thresholds, dense_prefix=plan.dense_prefix, count=True)


def _continued(
    context: Context, model: nn.Module, plans: Sequence[Plan], sequences: IntArray, weights: str
) -> list[Continuations | None]:
    """Of each plan; None where none are asked for, or the weights have another format than the plans'."""
    from was_search.service.steps.continuations import compare_continuations

    if not len(sequences) or any(plan.weights != weights for plan in plans):
        return [None] * len(plans)
    total = len(sequences) * (1 + len(plans))
    with context.reporter.phase("continue texts, dense and sparse", total) as advance:
        return list(compare_continuations(model, plans, sequences, advance=advance))


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


def require_model(context: Context, plan: Plan) -> None:
    """Refuse a plan that is not for the settings' model, before that is loaded, with a PlanError."""
    columns = context.model.source.columns
    plan.require_model(context.model.fingerprint if columns is None else columns.fingerprint, plan.shape)


def load_for(context: Context, plan: Plan | None, gpus: int = 1, *, weights: str = "") -> tuple[nn.Module, Structure]:
    """The settings' model with its structure, in this process; refused if ``plan`` is for another model.

    Its blocks are spread over ``gpus`` GPUs. Its weights are of the format ``weights``, whatever the plan was made
    for; where none is given they are as the settings say, and a plan for another format is refused.
    """
    from was_search.checkpoints.load import load_model
    from was_search.checkpoints.structure import find_structure

    if plan is not None:
        require_model(context, plan)
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
