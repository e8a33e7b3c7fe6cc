"""Whole passes on a pool: calibration, pricing, the greedy baseline and the dense model's predictions.

Each cuts its data into shards, a call each, and merges what the workers return.

Shards are cut at whole batches, so the batches, and with them every rounding, are the same whatever the number
of workers; counts and sums are merged in the order of the shards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from was_search.compensation import Compensation
from was_search.coordinator.contracts import WorkerPool
from was_search.coordinator.model_calls import Calibrate, FindDenseTop, GreedyBlock, Price
from was_search.masks.calibration import PassRunner
from was_search.masks.divergence import DenseTop, concatenate
from was_search.masks.histogram import Histograms
from was_search.shape import N_PROJECTIONS, FloatArray, ModelShape
from was_search.texts.protocol import TokenSet
from was_search.vectors.table import Table

Advance = Callable[[], None]


def shards(data: TokenSet, n: int) -> list[TokenSet]:
    """At most ``n`` runs of whole batches of ``data``, of nearly equal length."""
    batch_size = data.protocol.batch_size
    starts = np.arange(0, len(data.tokens), batch_size)
    parts = np.array_split(starts, min(n, len(starts)))
    return [data.part(slice(part[0], part[-1] + batch_size)) for part in parts]


def histogram_runner(
    pool: WorkerPool,
    data: TokenSet,
    compensation: Compensation | None = None,
    *,
    advance: Advance = lambda: None,
) -> PassRunner:
    """Passes over ``data`` on the pool, outputs corrected; ``advance`` is called after each shard."""
    parts = [pool.share(part) for part in shards(data, pool.n_parallel)]
    by = None if compensation is None else pool.share(compensation)

    def run_pass(thresholds: npt.NDArray[np.float32] | None) -> tuple[Histograms, FloatArray]:
        found = pool.map([Calibrate(part, thresholds, by) for part in parts], phase="calibrate", done=advance)
        histograms, seen, dropped = found[0]
        for other, more_seen, more_dropped in found[1:]:
            histograms, seen, dropped = histograms + other, seen + more_seen, dropped + more_dropped
        return histograms, dropped / np.maximum(seen, 1)

    return run_pass


def fine_shards(pool: WorkerPool, data: TokenSet) -> list[TokenSet]:
    """Four shards a worker: they even out slower ones, and one batch a shard would leave nothing to balance."""
    return shards(data, 4 * pool.n_parallel)


def fisher_prices(
    pool: WorkerPool,
    data: TokenSet,
    histograms: Histograms,
    grid: FloatArray,
    *,
    advance: Advance = lambda: None,
) -> FloatArray:
    """Mean Fisher price, nats per token, of every projection at every sparsity of ``grid``: [L, 7, G]."""
    shape = (histograms.n_blocks, N_PROJECTIONS)
    levels = np.stack([histograms.thresholds(np.full(shape, level)) for level in grid], axis=-1)
    found = pool.map([Price(part, levels) for part in fine_shards(pool, data)], phase="price", done=advance)
    sums = np.sum([part for part, _ in found], axis=0)
    return np.asarray(sums / sum(n for _, n in found), np.float64)


def greedy_table(
    pool: WorkerPool,
    data: TokenSet,
    dense: Histograms,
    shape: ModelShape,
    *,
    step: float,
    advance: Advance = lambda: None,
) -> Table:
    """The table of the component-level greedy by block-output error; each block is a call."""
    shared, histograms = pool.share(data), pool.share(dense)
    calls = [GreedyBlock(b, shared, histograms, step) for b in range(shape.n_blocks)]
    return Table("greedy", tuple(pool.map(calls, phase="greedy table", done=advance)))


def dense_top(pool: WorkerPool, data: TokenSet, k: int, *, advance: Advance = lambda: None) -> DenseTop:
    """The dense model's top ``k`` at every predicted token of ``data``.

    Raises:
        ConfigError: the vocabulary has fewer than ``k`` tokens.
    """
    calls = [FindDenseTop(part, k) for part in fine_shards(pool, data)]
    return concatenate(pool.map(calls, phase="dense top", done=advance))
