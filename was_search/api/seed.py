"""Step 2: tables and seed vectors from Fisher prices and from block-output error."""

from __future__ import annotations

import dataclasses
import time

from was_search.api.calibrate import Calibration, calibrate
from was_search.api.context import Context, pack_array, unpack_array
from was_search.protocol import TokenSet, content_hash
from was_search.seeds import Seed, make_seeds
from was_search.shape import FloatArray
from was_search.table import Table

PRICING_BATCH = 2
"""Sequences of one backward pass: bounds the memory of pricing."""

GREEDY_STEP = 0.05
"""Share of a block's parameters dropped by one step of the block-error greedy."""


def seed(context: Context, calibration: Calibration | None = None) -> list[Seed]:
    """The study's seeds at the target: uniform, greedy-uniform, Fisher-priced. Prices and tables are cached."""
    from was_search.pricing import DEFAULT_GRID

    calibration = calibration or calibrate(context)
    prices = fisher_prices(context, calibration, DEFAULT_GRID)
    greedy = greedy_table(context, calibration)
    return make_seeds(calibration.shape, context.settings.target, greedy, prices, DEFAULT_GRID)


def fisher_prices(context: Context, calibration: Calibration, grid: FloatArray) -> FloatArray:
    """Prices [L, 7, G] in nats per token; one backward pass over the pricing sequences."""
    started = time.perf_counter()
    data = _first(context.tokens("calibration"), context.settings.pricing_sequences)
    key = content_hash("prices", 1, calibration.key, data.protocol.n_sequences, grid, PRICING_BATCH)
    found = context.cache.get("prices", key)
    if found is not None:
        context.reporter.cached("price (Fisher)", data.protocol.describe(), time.perf_counter() - started)
        return unpack_array(found.payload)

    from was_workers import phases

    pool = context.pool
    parts = len(phases.shards(data.tokens, PRICING_BATCH, 4 * pool.n_workers))
    with context.reporter.phase(f"price (Fisher) on {data.protocol.describe()}", parts) as advance:
        prices = phases.fisher_prices(
            pool, data, calibration.histograms, grid, batch_size=PRICING_BATCH, advance=advance
        )
    context.cache.put("prices", key, pack_array(prices))
    return prices


def greedy_table(context: Context, calibration: Calibration) -> Table:
    """The component-level greedy by block-output error (TEAL, WAS), a block a call."""
    started = time.perf_counter()
    data = _first(context.tokens("calibration"), context.settings.greedy_sequences)
    key = content_hash("greedy", 1, calibration.key, data.protocol.n_sequences, GREEDY_STEP)
    found = context.cache.get("greedy", key)
    if found is not None:
        context.reporter.cached("greedy table", data.protocol.describe(), time.perf_counter() - started)
        return Table.from_json(found.meta["table"])

    from was_workers import phases

    shape = calibration.shape
    with context.reporter.phase(f"greedy table on {data.protocol.describe()}", shape.n_blocks) as advance:
        table = phases.greedy_table(
            context.pool, data, calibration.histograms, shape, step=GREEDY_STEP, advance=advance
        )
    context.cache.put("greedy", key, b"", {"table": table.to_json()})
    return table


def _first(data: TokenSet, n: int) -> TokenSet:
    """The first ``n`` sequences; they are in shuffled order, so they are spread over the text."""
    tokens = data.tokens[:n]
    return TokenSet(dataclasses.replace(data.protocol, n_sequences=len(tokens)), tokens)
