"""A compensation for a plan that there is already: the command ``compensate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from was_search.errors import DataError
from was_search.plan import Plan, require_writable
from was_search.service.context import Context
from was_search.service.steps.candidates import COMPENSATED, Request, measure
from was_search.service.steps.compensation import learn_compensation, learning_options, nothing_to_learn_from
from was_search.service.steps.dense import Dense
from was_search.service.steps.exporting import make_plan
from was_search.service.steps.question import Question
from was_search.vectors.budget import SparsityBudget


def compensate(context: Context, plan: Plan, folder: Path) -> Path | None:
    """Learn a compensation for ``plan`` on the settings' data and write the compensated plan into ``folder``.

    Its sparsities move along within their parameter-weighted mean, unless the plan was made for a predicted time.
    Thresholds are re-taken on the settings' calibration split. A compensation that the plan has is learned anew.

    Returns:
        The folder; None where the compensation does not help on text that it was not learned from.

    Raises:
        PlanError: the plan is of another model, or the folder cannot be written.
        DataError: the text is too short.
    """
    require_writable(folder)
    plan.require_model(context.model.fingerprint, plan.shape)
    settings = replace(context.settings, target=plan.budget, prefill=plan.prefill, target_speedup=0.0)
    question = Question(settings, Dense(context))
    if too_short := nothing_to_learn_from(question.dense):
        raise DataError(f"data: {too_short}")
    made_with = plan.provenance.get("settings")
    by_time = bool(isinstance(made_with, dict) and made_with.get("target_speedup"))
    budget = SparsityBudget(question.shape, round(plan.shape.sparsity(plan.sparsities), 9))
    point = question.dense.point(plan.sparsities, "the plan")
    options = learning_options(settings, move=not by_time)
    found = learn_compensation(question.dense, budget, options, plan.sparsities, point, "the plan")
    if found is None:
        return None
    (on_search,) = measure(question.dense, [Request(COMPENSATED, "search", found.point)])
    origin = {name: plan.provenance.get(name) for name in ("study", "slot", "origin")}
    return make_plan(
        question, COMPENSATED, found.sparsities, found.point, on_search, {**origin, "compensation": found.figures}
    ).save(folder)
