"""Streaming histograms of scores, and the thresholds read from them.

Scores are non-negative floats, so the top 16 bits of their float32 pattern (bfloat16 resolution) order them:
32,768 fixed bins, no pass to find the range, exact integer counts. Shards merge by addition.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from was_search.errors import InfeasibleError, StorageError
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray

N_BINS = 1 << 15
_FINITE_BINS = 0x7F80  # the first bin of inf; NaN patterns lie above


CountOp = Callable[[Tensor], Tensor]
"""A function like :func:`bin_counts`; a fused one may take its place."""


def bin_counts(scores: Tensor) -> Tensor:
    """Counts of ``scores`` (float32, any shape, >= 0) in the fixed bins: [32768] int64 on the same device."""
    # A NaN made by inf * 0 carries a sign bit; without the bit it counts as NaN.
    bins = (scores.contiguous().view(torch.int32).flatten() >> 16) & (N_BINS - 1)
    return torch.bincount(bins, minlength=N_BINS)


def bin_edges() -> FloatArray:
    """Lower edges of the bins and the last one's upper edge, float64 [32769]; inf from bin 0x7F80 on."""
    patterns = (np.arange(N_BINS + 1, dtype=np.uint64) << 16).astype(np.uint32)
    patterns[_FINITE_BINS:] = 0x7F800000
    return patterns.view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Histograms:
    """Score counts of every projection: int64 [L, 7, 32768]."""

    counts: IntArray

    def __getstate__(self) -> dict[str, IntArray]:
        return {"counts": self.counts}  # the cached sums would double what is sent to workers

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or self.counts.shape[1:] != (N_PROJECTIONS, N_BINS):
            raise StorageError(f"counts: shape must be [L, {N_PROJECTIONS}, {N_BINS}], got {self.counts.shape}")

    def __add__(self, other: Histograms) -> Histograms:
        return Histograms(self.counts + other.counts)

    @property
    def n_blocks(self) -> int:
        return int(self.counts.shape[0])

    @property
    def finite(self) -> bool:
        """Whether all scores were finite."""
        return not self.counts[..., _FINITE_BINS:].any()

    @cached_property
    def _cumulative(self) -> IntArray:
        return np.cumsum(self.counts, axis=-1)

    def thresholds(self, sparsities: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Thresholds at ``sparsities`` [L, 7]: these quantiles of each projection's scores; float32 [L, 7].

        Linear inside a bin. Sparsity 0 gives threshold 0, which drops nothing.

        Raises:
            InfeasibleError: another shape, a sparsity outside [0, 1), an empty histogram, or a quantile among
                non-finite scores (or in the last finite bin, which has no upper edge).
        """
        wanted = np.asarray(sparsities, np.float64)
        if wanted.shape != self.counts.shape[:2]:
            raise InfeasibleError(f"sparsities: shape must be {self.counts.shape[:2]}, got {wanted.shape}")
        if not np.all((wanted >= 0.0) & (wanted < 1.0)):
            raise InfeasibleError(f"sparsities: must be in [0, 1), got {wanted.min()} to {wanted.max()}")
        edges = bin_edges()
        result = np.zeros(wanted.shape, np.float64)
        for b, p in np.ndindex(*wanted.shape):
            if wanted[b, p] > 0.0:
                result[b, p] = self._quantile(b, p, float(wanted[b, p]), edges)
        return result.astype(np.float32)

    def _quantile(self, b: int, p: int, sparsity: float, edges: FloatArray) -> float:
        cumulative = self._cumulative[b, p]
        total = int(cumulative[-1])
        if total == 0:
            raise InfeasibleError(f"histogram of block {b}, projection {p} is empty")
        rank = sparsity * total
        i = int(np.searchsorted(cumulative, rank, side="left"))
        if i >= _FINITE_BINS - 1:
            raise InfeasibleError(f"scores of block {b}, projection {p} are not finite at sparsity {sparsity}")
        below = int(cumulative[i - 1]) if i else 0
        inside = (rank - below) / int(self.counts[b, p, i])
        return float(edges[i] + inside * (edges[i + 1] - edges[i]))

    def to_bytes(self) -> bytes:
        """Compressed little-endian int64 counts; :meth:`from_bytes` reads them."""
        return zlib.compress(np.ascontiguousarray(self.counts, "<i8").tobytes(), 1)

    @classmethod
    def from_bytes(cls, payload: bytes, n_blocks: int) -> Histograms:
        """Histograms of ``n_blocks`` blocks from :meth:`to_bytes`.

        Raises:
            StorageError: the payload is damaged or has another length.
        """
        expected = n_blocks * N_PROJECTIONS * N_BINS * 8
        try:
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(payload, expected + 1)
        except zlib.error as error:
            raise StorageError(f"cached histograms are damaged: {error}; delete the row and calibrate again") from error
        if len(raw) != expected or not unpacker.eof:
            raise StorageError(
                f"cached histograms: {expected} bytes expected for {n_blocks} blocks, got {len(raw)}; "
                "delete the row and calibrate again"
            )
        return cls(np.frombuffer(raw, "<i8").astype(np.int64).reshape(n_blocks, N_PROJECTIONS, N_BINS))
