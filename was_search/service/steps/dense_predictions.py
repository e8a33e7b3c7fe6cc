"""The dense model's top predictions: what the fitness ``kl`` compares with, and what a compensation is learned from.

Cached in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.masks.divergence import ENTRY_BYTES, DenseTop, check_top_k, concatenate
from was_search.service.caching import CachedRow, array_row, cached
from was_search.service.context import Context
from was_search.service.model import Model
from was_search.texts.protocol import TokenSet, content_hash

if TYPE_CHECKING:
    from was_storage.studies.cache import ArtifactCache

PIECE_BYTES = 64 * 2**20
"""Bytes of one cached row: many rows of this size suit a database better than one, and any number of sequences fits."""


def check_vocabulary(model: Model, kl_top_k: int) -> None:
    """Raise ConfigError if the model's configuration says that its vocabulary is below ``kl_top_k``.

    A configuration that says nothing of it is no error here, as the workers check the model itself.
    """
    from was_search.checkpoints.files import read_config

    vocabulary = read_config(model.source).get("vocab_size")
    if isinstance(vocabulary, int):
        check_top_k(kl_top_k, vocabulary)


def dense_top_key(context: Context, data: TokenSet, k: int | None = None) -> str:
    """Key of :func:`dense_top`'s result in the cache."""
    k = k or context.settings.kl_top_k
    return content_hash("dense-top", 1, context.model.key, data.protocol, context.placement.device, k)


def dense_top(context: Context, data: TokenSet, k: int | None = None) -> DenseTop:
    """The dense model's top ``k`` on ``data``, cached; as many as the settings say if None."""
    k = k or context.settings.kl_top_k
    name = f"dense top {k}"

    def make() -> DenseTop:
        from was_search.coordinator import phases

        pool = context.pool
        parts = len(phases.fine_shards(pool, data))
        with context.phase(f"{name} on {data.protocol.brief()}", parts) as advance:
            return phases.dense_top(pool, data, k, advance=advance)

    return cached(
        Pieces(
            context.cache, dense_top_key(context, data, k), len(data.tokens), data.protocol.predicted_per_sequence, k
        ),
        make,
        context.reporter,
        name,
        data.protocol.brief(),
    )


@dataclass(frozen=True)
class Pieces:
    """The dense top of n sequences, [n, predicted, k], in pieces of :data:`PIECE_BYTES`.

    A killed run may have stored only some of the pieces; then they count as missing.
    """

    cache: ArtifactCache
    key: str
    n: int
    predicted: int
    k: int

    def get(self) -> DenseTop | None:
        pieces = []
        for start in self._starts:
            rows = self.rows(start)
            indices, log_probs = rows[0].get(), rows[1].get()
            if indices is None or log_probs is None:
                return None
            pieces.append(DenseTop(indices, log_probs))
        return concatenate(pieces)

    def put(self, value: DenseTop) -> None:
        for start in self._starts:
            piece = value[start : start + self._starts.step]
            for row, array in zip(self.rows(start), (piece.indices, piece.log_probs), strict=True):
                row.put(array)

    @property
    def _starts(self) -> range:
        return range(0, self.n, max(1, PIECE_BYTES // (self.predicted * self.k * ENTRY_BYTES)))

    def rows(self, start: int) -> tuple[CachedRow[Any], CachedRow[Any]]:
        size = min(self._starts.step, self.n - start)

        def row(name: str, width: int, dtype: type[np.generic]) -> CachedRow[Any]:
            key = content_hash(self.key, start, PIECE_BYTES, name)
            return array_row(self.cache, "dense-top", key, (size, self.predicted, width), dtype)

        return row("indices", self.k, np.int32), row("log_probs", self.k + 1, np.float32)
