"""Calibration, pricing, the greedy baseline and the dense model's predictions, spread over the workers of a pool.

Shards are cut at whole batches, so the batches, and with them every rounding, are the same whatever the number
of workers; counts and sums are merged in the order of the shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from was_search.budget import Budget
from was_search.calibration import PassRunner
from was_search.descent import DescentOptions
from was_search.divergence import DenseTop, concatenate
from was_search.histogram import Histograms
from was_search.protocol import TokenSet
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray, ModelShape
from was_search.table import Table
from was_workers.pool import Pool

Advance = Callable[[], None]


def shards(tokens: IntArray, batch_size: int, n: int) -> list[IntArray]:
    """At most ``n`` runs of whole batches of ``tokens`` [sequences, sequence_length], of nearly equal length."""
    starts = np.arange(0, len(tokens), batch_size)
    return [tokens[part[0] : part[-1] + batch_size] for part in np.array_split(starts, min(n, len(starts)))]


def histogram_runner(pool: Pool, data: TokenSet, *, advance: Advance = lambda: None) -> PassRunner:
    """Passes over ``data`` on the pool; ``advance`` is called after each shard."""
    protocol = data.protocol
    cut = shards(data.tokens, protocol.batch_size, pool.n_parallel)
    parts = [ray.put(part) for part in cut]

    def run_pass(thresholds: npt.NDArray[np.float32] | None) -> tuple[Histograms, FloatArray]:
        found = pool.map(
            [("histograms", part, thresholds, protocol.batch_size, protocol.dense_prefix) for part in parts],
            tokens=[part.size for part in cut],
            phase="calibrate",
            done=advance,
        )
        histograms, seen, dropped = found[0]
        for other, more_seen, more_dropped in found[1:]:
            histograms, seen, dropped = histograms + other, seen + more_seen, dropped + more_dropped
        return histograms, dropped / np.maximum(seen, 1)

    return run_pass


def fisher_prices(
    pool: Pool,
    data: TokenSet,
    histograms: Histograms,
    grid: FloatArray,
    *,
    advance: Advance = lambda: None,
) -> FloatArray:
    """Mean Fisher price, nats per token, of every projection at every sparsity of ``grid``: [L, 7, G]."""
    shape = (histograms.n_blocks, N_PROJECTIONS)
    levels = np.stack([histograms.thresholds(np.full(shape, level)) for level in grid], axis=-1)
    # One batch a shard would leave nothing to balance; four a worker even out slower ones.
    protocol = data.protocol
    parts = shards(data.tokens, protocol.batch_size, 4 * pool.n_parallel)
    found = pool.map(
        [
            (
                "prices",
                part,
                levels,
                protocol.batch_size,
                protocol.dense_prefix,
                protocol.predicted_per_sequence,
            )
            for part in parts
        ],
        tokens=[part.size for part in parts],
        phase="price",
        done=advance,
    )
    sums = np.sum([part for part, _ in found], axis=0)
    return np.asarray(sums / sum(n for _, n in found), np.float64)


def descent_call(
    data: TokenSet,
    tokens: Any,
    histograms: Any,
    start: FloatArray,
    budget: Budget,
    options: DescentOptions,
    per_round: int,
    seed: int,
) -> tuple[Any, ...]:
    """The pool's call of one descent; ``tokens`` and ``histograms`` may be references to them."""
    protocol = data.protocol
    return (
        "descend",
        tokens,
        histograms,
        start,
        budget,
        options,
        per_round,
        protocol.batch_size,
        protocol.dense_prefix,
        protocol.predicted_per_sequence,
        seed,
    )


def greedy_table(
    pool: Pool,
    data: TokenSet,
    dense: Histograms,
    shape: ModelShape,
    *,
    step: float,
    advance: Advance = lambda: None,
) -> Table:
    """The component-level greedy by block-output error, a block a call."""
    protocol = data.protocol
    tokens, histograms = ray.put(data.tokens), ray.put(dense)
    blocks = pool.map(
        [
            ("block_table", b, tokens, histograms, protocol.batch_size, protocol.dense_prefix, step)
            for b in range(shape.n_blocks)
        ],
        tokens=[data.tokens.size] * shape.n_blocks,
        phase="greedy table",
        done=advance,
    )
    return Table("greedy", tuple(blocks))


def dense_top(pool: Pool, data: TokenSet, k: int, *, advance: Advance = lambda: None) -> DenseTop:
    """The dense model's top ``k`` at every predicted token of ``data``.

    Raises:
        ConfigError: the vocabulary has fewer than ``k`` tokens.
    """
    protocol = data.protocol
    parts = shards(data.tokens, protocol.batch_size, 4 * pool.n_parallel)
    found = pool.map(
        [("dense_top", part, k, protocol.predicted_per_sequence, protocol.batch_size) for part in parts],
        tokens=[part.size for part in parts],
        phase="dense top",
        done=advance,
    )
    return concatenate(found)
