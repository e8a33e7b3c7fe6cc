"""The dense model's top predictions on the search split: what the fitness ``kl`` compares with. Cached in pieces."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from was_search.api.context import Context, pack_array, unpack_array
from was_search.divergence import ENTRY_BYTES, DenseTop, check_top_k, concatenate
from was_search.protocol import content_hash

PIECE_BYTES = 64 * 2**20
"""Of one cached row: a database takes many of these more gladly than one of all, and no number of sequences is too
large."""


def check_fitness(context: Context) -> None:
    """Raise ConfigError if the model's configuration says that its vocabulary is below ``kl_top_k``.

    A configuration that does not say it is no error here: the workers check the model itself.
    """
    from was_search.checkpoint import read_config

    if context.settings.fitness == "kl":
        vocabulary = read_config(context.source).get("vocab_size")
        if isinstance(vocabulary, int):
            check_top_k(context.settings.kl_top_k, vocabulary)


def dense_top(context: Context) -> DenseTop | None:
    """The dense model's top on the search split, computed once and cached; None for the fitness ``nll``."""
    if context.settings.fitness == "nll":
        return None
    return context.once("dense top", lambda: _dense_top(context))


def dense_top_key(context: Context) -> str:
    """Names the result of :func:`dense_top` in the cache."""
    protocol, device = context.tokens("search").protocol, context.placement.device
    return content_hash("dense-top", 1, context.model_key, protocol, device, context.settings.kl_top_k)


def _dense_top(context: Context) -> DenseTop:
    started = time.perf_counter()
    data, k, key = context.tokens("search"), context.settings.kl_top_k, dense_top_key(context)
    sequence_bytes = data.protocol.predicted_per_sequence * k * ENTRY_BYTES
    step = max(1, PIECE_BYTES // sequence_bytes)
    starts = range(0, len(data.tokens), step)
    name = f"dense top {k}"
    shape = (len(data.tokens), data.protocol.predicted_per_sequence, k)
    if (found := _cached(context, key, starts, shape)) is not None:
        context.reporter.cached(name, data.protocol.brief(), time.perf_counter() - started)
        return found

    from was_search.coordinator import phases

    pool = context.pool
    parts = len(phases.fine_shards(pool, data))
    with context.phase(f"{name} on {data.protocol.brief()}", parts) as advance:
        top = phases.dense_top(pool, data, k, advance=advance)
    for start in starts:
        piece = top[start : start + step]
        context.cache.put("dense-top", _piece_key(key, start, "indices"), pack_array(piece.indices))
        context.cache.put("dense-top", _piece_key(key, start, "log_probs"), pack_array(piece.log_probs))
    return top


def _cached(context: Context, key: str, starts: range, shape: tuple[int, int, int]) -> DenseTop | None:
    """All pieces of ``shape`` [n, predicted, k], or None where one is missing: a killed run may have put only some."""
    n, predicted, k = shape

    def piece(start: int, name: str, width: int, dtype: type[np.generic]) -> Any:
        wanted = (min(starts.step, n - start), predicted, width)
        return context.cache.get(
            "dense-top", _piece_key(key, start, name), lambda row: unpack_array(row.payload, wanted, dtype)
        )

    pieces = []
    for start in starts:
        indices, log_probs = piece(start, "indices", k, np.int32), piece(start, "log_probs", k + 1, np.float32)
        if indices is None or log_probs is None:
            return None
        pieces.append(DenseTop(indices, log_probs))
    return concatenate(pieces)


def _piece_key(key: str, start: int, name: str) -> str:
    return content_hash(key, start, PIECE_BYTES, name)
