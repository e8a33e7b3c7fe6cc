"""Step 2: tables and seed vectors from Fisher prices and from block-output error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from was_search.service.caching import CachedRow, array_row, cached
from was_search.service.context import Context
from was_search.service.steps.question import Question
from was_search.service.steps.study_identity import seed_descent_options
from was_search.service.steps.warm_start import warm_seeds
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import content_hash
from was_search.vectors.seeds import GREEDY_STEP, SEED_SEQUENCES, Seed, baseline_seeds, fisher_seed, point_seed
from was_search.vectors.table import Table

if TYPE_CHECKING:
    from was_storage.studies.cache import Artifact


def seed(context: Context, question: Question | None = None, warm: list[Seed] | None = None) -> list[Seed]:
    """The study's seeds at the target: uniform, greedy-uniform if asked for, the warm start's if there is one, Fisher.

    ``question`` is that of the settings, and ``warm`` what :func:`warm_seeds` gives for
    it, where they are at hand.

    The Fisher seed is the optimum of the dense model's prices, moved on by a short descent: at high sparsity
    prices no longer add up, slopes at the sparse point do. All that is costly is cached.
    """
    from was_search.masks.pricing import DEFAULT_GRID as GRID

    question = question or Question.of(context)
    settings = question.settings
    settings.require_one_target()
    warm = warm_seeds(context, question) if warm is None else warm
    budget, shape = question.budget, question.shape
    greedy = greedy_table(context, question) if settings.greedy_sequences else None
    fisher = fisher_seed(question.dense.prices, GRID, budget)
    if settings.seed_rounds:
        fisher = point_seed("fisher", seed_descent(context, question, fisher.sparsities), shape)
    return [*baseline_seeds(budget, greedy), *warm, fisher]


def seed_descent(context: Context, question: Question, start: FloatArray) -> FloatArray:
    """Sparsities [L, 7] after ``seed_rounds`` steps from ``start``."""
    settings, data = question.settings, question.tokens.slopes
    options = seed_descent_options(settings)
    calibration, budget = question.calibration, question.budget
    parts = (calibration.key, data.protocol, start, budget.identity, vars(options), SEED_SEQUENCES, settings.seed)
    key = content_hash("seed-descent", 3, *parts)
    name = f"descend {settings.seed_rounds} rounds from the Fisher prices"

    def make() -> FloatArray:
        from was_search.coordinator.divided_passes import descend_on

        pool = context.pool
        with context.phase(name):
            shared = pool.share(data), pool.share(calibration.histograms)
            return descend_on(
                *(pool, *shared, start, budget, options, SEED_SEQUENCES, settings.seed), phase="seed descent"
            )

    return cached(
        array_row(context.cache, "descent", key, calibration.shape.params.shape, np.float64),
        make,
        context.reporter,
        name,
        data.protocol.brief(),
    )


def sensitivity(question: Question) -> FloatArray:
    """What dropping the target's share of each projection's inputs costs alone, from the dense model's prices.

    The share of a budget of time is the flat sparsity that meets it. Returns [L, 7], nats per token for one percent of
    all projections' weights dropped.
    """
    from was_search.masks.pricing import DEFAULT_GRID as GRID

    shape, target = question.shape, question.budget.flat
    prices = question.dense.prices
    at_target = np.apply_along_axis(lambda curve: np.interp(target, GRID, curve), -1, prices)
    percent_dropped = 100.0 * target * shape.params / shape.params.sum()
    return np.asarray(at_target / percent_dropped, np.float64)


def greedy_table(context: Context, question: Question) -> Table:
    """Table of the component-level greedy by block-output error (TEAL, WAS); each block is a call of a worker."""
    calibration, data = question.calibration, question.tokens.calibration.first(question.settings.greedy_sequences)
    key = content_hash("greedy", 3, calibration.key, data.protocol, GREEDY_STEP)
    shape = calibration.shape

    def make() -> Table:
        from was_search.coordinator import phases

        with context.phase(f"greedy table on {data.protocol.brief()}", shape.n_blocks) as advance:
            return phases.greedy_table(
                context.pool, data, calibration.histograms, shape, step=GREEDY_STEP, advance=advance
            )

    return cached(
        CachedRow(
            context.cache,
            "greedy",
            key,
            lambda row: _read_table(row, shape),
            lambda table: (b"", {"table": table.to_json()}),
        ),
        make,
        context.reporter,
        "greedy table",
        data.protocol.brief(),
    )


def _read_table(found: Artifact, shape: ModelShape) -> Table:
    table = Table.from_json(found.meta["table"])
    if len(table.blocks) != shape.n_blocks:
        raise ValueError(f"{shape.n_blocks} blocks are wanted, got {len(table.blocks)}")
    return table
