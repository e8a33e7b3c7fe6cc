"""Fisher prices: what dropping a share of a projection's inputs costs the dense model, to first order."""

from __future__ import annotations

import numpy as np

from was_search.service.caching import array_row, cached
from was_search.service.context import Context
from was_search.service.steps.calibration import Calibration
from was_search.shape import FloatArray
from was_search.texts.protocol import TokenSet, content_hash
from was_search.vectors.seeds import PRICES


def fisher_prices(context: Context, calibration: Calibration, data: TokenSet, grid: FloatArray) -> FloatArray:
    """Prices [L, 7, G] in nats per token on the first sequences of ``data``, from one backward pass; cached."""
    data = data.first(context.settings.pricing_sequences)
    key = content_hash("prices", PRICES, calibration.key, data.protocol, grid)

    def make() -> FloatArray:
        from was_search.coordinator import phases

        pool = context.pool
        parts = len(phases.fine_shards(pool, data))
        with context.phase(f"price (Fisher) on {data.protocol.brief()}", parts) as advance:
            return phases.fisher_prices(pool, data, calibration.histograms, grid, advance=advance)

    return cached(
        array_row(context.cache, "prices", key, (*calibration.shape.params.shape, len(grid)), np.float64),
        make,
        context.reporter,
        "price (Fisher)",
        data.protocol.brief(),
    )
