"""Step 2: tables and seed vectors from Fisher prices and from block-output error."""

from __future__ import annotations

import time

from was_search.api.calibrate import Calibration, OperatingPoint, calibrate, operating_point
from was_search.api.context import Context, pack_array, unpack_array
from was_search.api.warm import warm_seeds
from was_search.protocol import TokenSet, content_hash
from was_search.seeds import REPRICE_RADIUS, Seed, baseline_seeds, fisher_seed
from was_search.shape import FloatArray
from was_search.table import Table

PRICING_BATCH = 2
"""Sequences of one backward pass: bounds the memory of pricing."""

GREEDY_STEP = 0.0125
"""Share of a block's parameters dropped by one step of the block-error greedy: 30 % of a projection of 4 %."""


def seed(context: Context, calibration: Calibration | None = None) -> list[Seed]:
    """The study's seeds at the target: uniform, greedy-uniform, the warm start's if there is one, Fisher-priced.

    Prices and tables are cached.

    The Fisher seed is priced on the dense model, then priced again at the sparse point that this gave, where
    prices of large steps add up better; ``reprice_rounds`` says how often.
    """
    from was_search.pricing import DEFAULT_GRID as GRID

    settings = context.settings
    settings.require_one_target()
    warm = warm_seeds(context)
    calibration = calibration or calibrate(context)
    shape = calibration.shape
    greedy = greedy_table(context, calibration)
    prices = fisher_prices(context, calibration, GRID)
    fisher = fisher_seed(prices, GRID, shape, settings.target)
    for number in range(1, settings.reprice_rounds + 1):
        point = operating_point(context, calibration, fisher.sparsities, "the priced point")
        prices = fisher_prices(context, calibration, GRID, point)
        fisher = fisher_seed(
            prices, GRID, shape, settings.target, around=fisher.sparsities, radius=REPRICE_RADIUS / number
        )
    return [*baseline_seeds(shape, settings.target, greedy), *warm, fisher]


def fisher_prices(
    context: Context, calibration: Calibration, grid: FloatArray, point: OperatingPoint | None = None
) -> FloatArray:
    """Prices [L, 7, G] in nats per token, on the dense model or at a sparse ``point``; one backward pass."""
    started = time.perf_counter()
    data = _first(context.tokens("calibration"), context.settings.pricing_sequences)
    taken_at = calibration.key if point is None else point.key
    key = content_hash("prices", 3, taken_at, data.protocol, grid, PRICING_BATCH)
    name = "price (Fisher)" if point is None else "price again at the priced point"
    found = context.cache.get("prices", key)
    if found is not None:
        context.reporter.cached(name, data.protocol.brief(), time.perf_counter() - started)
        return unpack_array(found.payload)

    from was_workers import phases

    pool = context.pool
    parts = len(phases.shards(data.tokens, PRICING_BATCH, 4 * pool.n_workers))
    with context.reporter.phase(f"{name} on {data.protocol.brief()}", parts) as advance:
        prices = phases.fisher_prices(
            pool,
            data,
            calibration.histograms if point is None else point.histograms,
            grid,
            batch_size=PRICING_BATCH,
            thresholds=None if point is None else point.thresholds,
            advance=advance,
        )
    context.cache.put("prices", key, pack_array(prices))
    return prices


def greedy_table(context: Context, calibration: Calibration) -> Table:
    """The component-level greedy by block-output error (TEAL, WAS), a block a call."""
    started = time.perf_counter()
    data = _first(context.tokens("calibration"), context.settings.greedy_sequences)
    key = content_hash("greedy", 3, calibration.key, data.protocol, GREEDY_STEP)
    found = context.cache.get("greedy", key)
    if found is not None:
        context.reporter.cached("greedy table", data.protocol.brief(), time.perf_counter() - started)
        return Table.from_json(found.meta["table"])

    from was_workers import phases

    shape = calibration.shape
    with context.reporter.phase(f"greedy table on {data.protocol.brief()}", shape.n_blocks) as advance:
        table = phases.greedy_table(
            context.pool, data, calibration.histograms, shape, step=GREEDY_STEP, advance=advance
        )
    context.cache.put("greedy", key, b"", {"table": table.to_json()})
    return table


def _first(data: TokenSet, n: int) -> TokenSet:
    """The first ``n`` sequences; they are in shuffled order, so they are spread over the text."""
    return TokenSet.of(data.protocol, data.tokens[:n])
