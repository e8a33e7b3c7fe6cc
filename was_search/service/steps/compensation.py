"""Step 4b: the compensation. Scales and constants of outputs are learned for a vector, whose sparsities move along."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.coordinator.divided_passes import PassesOnPool, worth_dividing
from was_search.coordinator.model_calls import EvaluateThresholds, LearnCompensation
from was_search.masks.compensating import CompensationOptions, CompensationState, learn_steps
from was_search.service.context import Context
from was_search.service.reports.study_report import compensation_words
from was_search.service.settings import Settings
from was_search.service.steps.calibration import OperatingPoint
from was_search.service.steps.candidates import shared_compensation
from was_search.service.steps.dense import Dense
from was_search.service.steps.dense_predictions import dense_top
from was_search.service.steps.question import Question
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import content_hash
from was_search.vectors.budget import Budget

if TYPE_CHECKING:
    from was_storage.studies.cache import Artifact

STEPS_PER_CALL = 20
"""Steps between two points at which a run can go on after it was killed."""


@dataclass(frozen=True)
class Compensated:
    """A vector with the compensation that was learned along.

    Attributes:
        sparsities: float64 [L, 7].
        point: its operating point, which has the compensation.
        figures: how it was learned and what it was judged by, as JSON.
    """

    sparsities: FloatArray
    point: OperatingPoint
    figures: dict[str, Any]


def learning_options(settings: Settings, *, move: bool = True) -> CompensationOptions:
    """How the settings learn; without ``move`` the sparsities stay where they are."""
    still = {} if move else {"move": 0.0}
    return CompensationOptions(steps=settings.compensation_steps, sequences=settings.compensation_sequences, **still)


def as_exported(
    question: Question, sparsities: FloatArray, point: OperatingPoint, name: str
) -> tuple[FloatArray, OperatingPoint, dict[str, Any]]:
    """A vector and its point as they are exported: compensated if the settings say so and it helps.

    The third is what a plan's provenance says of that, empty where nothing is corrected.
    """
    settings = question.settings
    if settings.compensation == "off":
        return sparsities, point, {}
    found = learn_compensation(question.dense, question.budget, learning_options(settings), sparsities, point, name)
    if found is None:
        return sparsities, point, {}
    return found.sparsities, found.point, {"compensation": found.figures}


def learn_compensation(
    dense: Dense, budget: Budget, options: CompensationOptions, sparsities: FloatArray, point: OperatingPoint, name: str
) -> Compensated | None:
    """Learn a compensation of the vector called ``name``, and judge it on sequences that it was not learned from.

    Args:
        dense: what is known of the dense model; its settings name text and protocol.
        budget: what the vector spends, and goes on to spend.
        options: how it is learned.
        sparsities: the vector, [L, 7].
        point: its operating point, uncompensated.
        name: in phases.

    Returns:
        None where the divergence from the dense model is not lower with it, or where there is no text to judge by.
    """
    context, tokens = dense.context, dense.tokens
    if too_short := nothing_to_learn_from(dense):
        context.reporter.note(f"no compensation: {too_short}")
        return None
    state = _learned(dense, budget, options, sparsities, point)
    found = state.mean_sparsities(budget, options)
    corrected = dense.point(found, f"{name}, compensated", state.compensation(dense.calibration.shape))
    before, after = _divergences(dense, [point, corrected])
    figures = {
        "steps": options.steps,
        "tokens": options.steps * min(options.sequences, len(tokens.learning.tokens)) * tokens.learning.tokens.shape[1],
        "validation_kl_nats": {"without": before, "with": after},
        "learned_from": [tokens.search.protocol.describe(), tokens.slopes.protocol.describe()],
        "learning_sequences": len(tokens.learning.tokens),
        "validation_sequences": len(tokens.validation.tokens),
    }
    context.reporter.note(compensation_words(figures))
    if not after < before:
        context.reporter.note("the compensation is left out, as it does not help there")
        return None
    return Compensated(found, corrected, figures)


def nothing_to_learn_from(dense: Dense) -> str:
    """Why no compensation can be learned from the text; "" where one can."""
    if len(dense.tokens.slopes.tokens) >= 2:
        return ""
    return (
        "one sequence of the calibration split to learn from and one to judge by are needed; give more text or a "
        "smaller sequence_length"
    )


def _learned(
    dense: Dense, budget: Budget, options: CompensationOptions, sparsities: FloatArray, point: OperatingPoint
) -> CompensationState:
    """The state after the last step; taken from the cache where it is there, and resumed where a part of it is."""
    context, data, shape = dense.context, dense.tokens.learning, dense.calibration.shape
    key = content_hash(
        *("compensation", 1, context.model.key, context.settings.scoring, context.placement.device, data.protocol),
        *(context.settings.kl_top_k, budget.identity, vars(options), context.settings.seed, STEPS_PER_CALL),
        *(np.round(sparsities, 9), point.thresholds),
    )
    started = time.perf_counter()
    state = context.cache.get("compensation", key, lambda row: _read(row, shape))
    if state is not None and state.done >= options.steps:
        detail = f"{state.done} steps on {data.protocol.brief()}"
        context.reporter.cached("learn a compensation", detail, time.perf_counter() - started)
        return state
    state = state or CompensationState.start(shape, np.round(sparsities, 9), point.thresholds)
    top, pool = dense_top(context, data, _top_k(context)), context.pool
    shared_data, shared_top = pool.share(data), pool.share(top)
    divided = worth_dividing(pool, min(options.sequences, len(data.tokens)), shape, data.protocol)
    left = -(-(options.steps - state.done) // STEPS_PER_CALL)
    with context.phase(f"learn a compensation on {data.protocol.brief()}", left) as advance:
        while state.done < options.steps:
            seed = context.settings.seed
            if divided:
                passes = PassesOnPool(pool, shape, shared_data, shared_top)
                state = learn_steps(passes, state, budget, options, seed=seed, steps=STEPS_PER_CALL)
                advance()
            else:
                call = LearnCompensation(shared_data, shared_top, state, budget, options, seed, STEPS_PER_CALL)
                (state,) = pool.map([call], phase="compensation", done=advance)
            context.cache.replace("compensation", key, *_packed(state))
    return state


def _divergences(dense: Dense, points: list[OperatingPoint]) -> list[float]:
    """Mean divergence from the dense model on the validation sequences, nats per token, at each point."""
    context, data, pool = dense.context, dense.tokens.validation, dense.context.pool
    top = pool.share(dense_top(context, data, _top_k(context)))
    calls = [EvaluateThresholds(data, point.thresholds, top, shared_compensation(pool, point)) for point in points]
    with context.phase(f"judge the compensation on {data.protocol.brief()}", len(calls)) as advance:
        return [found.loss_nats for found in pool.map(calls, phase="evaluate", done=advance)]


def _top_k(context: Context) -> int:
    """How many of the dense model's tokens count: all of a vocabulary that has fewer than the settings say."""
    return min(context.settings.kl_top_k, context.model.token_rows)


def _packed(state: CompensationState) -> tuple[bytes, dict[str, Any]]:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(state, name) for name in _ARRAYS})
    return buffer.getvalue(), {"done": state.done, "losses": list(state.losses)}


def _read(found: Artifact, shape: ModelShape) -> CompensationState:
    start = CompensationState.start(shape, np.zeros(shape.params.shape), np.zeros(shape.params.shape, np.float32))
    with np.load(io.BytesIO(found.payload), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in _ARRAYS}
    for name, array in arrays.items():
        wanted = getattr(start, name)
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise ValueError(f"{name}: {wanted.dtype} {wanted.shape} is wanted, got {array.dtype} {array.shape}")
    return CompensationState(int(found.meta["done"]), **arrays, losses=tuple(map(float, found.meta["losses"])))


_ARRAYS = ("sparsities", "thresholds", "values", "moments", "direction", "kept")
