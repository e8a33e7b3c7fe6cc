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
        wanted = required_sparsities(sparsities, self.counts.shape[:2])
        cumulative = self._cumulative
        totals = cumulative[..., -1]
        bins, below, inside = (np.zeros(wanted.shape, np.int64) for _ in range(3))
        for at in np.ndindex(*wanted.shape):
            i = int(np.searchsorted(cumulative[at], wanted[at] * totals[at], side="left"))
            bins[at] = i = min(i, N_BINS - 1)
            below[at] = cumulative[at][i - 1] if i else 0
            inside[at] = self.counts[at][i]
        return _interpolated(wanted, bins, below, inside, totals)

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


@dataclass(frozen=True, eq=False)
class DeviceHistograms:
    """Score counts that stay where they were taken, int64 [L, 7, 32768]: a GPU's need not cross to the host."""

    counts: Tensor

    def host(self) -> Histograms:
        """The same on the host."""
        return Histograms(self.counts.cpu().numpy())

    @cached_property
    def _cumulative(self) -> Tensor:
        return self.counts.cumsum(-1)

    def thresholds(self, sparsities: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """What :meth:`Histograms.thresholds` gives, bit for bit, with its errors."""
        wanted = required_sparsities(sparsities, tuple(self.counts.shape[:2]))
        cumulative = self._cumulative
        ranks = torch.tensor(wanted, device=cumulative.device)[..., None] * cumulative[..., -1:]
        # Counts are integers: the first sum that reaches a rank reaches the next integer.
        at = torch.searchsorted(cumulative, ranks.ceil().long()).clamp_(max=N_BINS - 1)
        below = torch.where(at > 0, cumulative.gather(-1, (at - 1).clamp_(min=0)), 0)
        numbers = torch.stack([at, below, self.counts.gather(-1, at), cumulative[..., -1:]])[..., 0].cpu().numpy()
        return _interpolated(wanted, *numbers)


@dataclass(frozen=True, eq=False)
class PackedCounts:
    """Score counts to be sent: those that are not 0, a small part of them.

    Attributes:
        places: where they are among the flat counts [L, 7, 32768], int32 where that is enough.
        counts: int32 where they fit.
    """

    places: npt.NDArray[np.integer]
    counts: npt.NDArray[np.integer]

    @classmethod
    def of(cls, counts: Tensor) -> PackedCounts:
        """``counts`` int64 [L, 7, 32768], on any device."""
        flat = counts.flatten()
        places = flat.nonzero()[:, 0]
        return cls(_narrow(places), _narrow(flat[places]))

    def add_to(self, counts: Tensor) -> Tensor:
        """Add them to ``counts`` int64 [L, 7, 32768] on the host, in place; returns that."""
        counts.view(-1).numpy()[self.places] += self.counts  # each place comes once
        return counts


def no_counts(n_blocks: int) -> Tensor:
    """Zeros, int64 [L, 7, 32768]."""
    return torch.zeros((n_blocks, N_PROJECTIONS, N_BINS), dtype=torch.int64)


def _narrow(numbers: Tensor) -> npt.NDArray[np.integer]:
    """``numbers`` on the host, int32 where they fit."""
    fits = not len(numbers) or int(numbers.max()) < 1 << 31
    found: npt.NDArray[np.integer] = (numbers.int() if fits else numbers).cpu().numpy()
    return found


def required_sparsities(sparsities: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """``sparsities`` as float64 of this ``shape``, each in [0, 1).

    Raises:
        InfeasibleError: they are not.
    """
    wanted = np.asarray(sparsities, np.float64)
    if wanted.shape != shape:
        raise InfeasibleError(f"sparsities: shape must be {shape}, got {wanted.shape}")
    if not np.all((wanted >= 0.0) & (wanted < 1.0)):
        raise InfeasibleError(f"sparsities: must be in [0, 1), got {wanted.min()} to {wanted.max()}")
    return wanted


def _interpolated(
    sparsities: FloatArray, bins: IntArray, below: IntArray, inside: IntArray, totals: IntArray
) -> npt.NDArray[np.float32]:
    """Thresholds [L, 7] at ``sparsities``, linear inside of the bins that hold their ranks; 0 at sparsity 0.

    Args:
        sparsities: float64 [L, 7].
        bins: the bins, int64 [L, 7].
        below: counts under each bin.
        inside: counts in it.
        totals: all counts.

    Raises:
        InfeasibleError: an empty histogram, or a bin of scores that are not finite, or the last finite one.
    """
    sparse = sparsities > 0.0
    for b, p in zip(*np.nonzero(sparse & (totals == 0)), strict=True):
        raise InfeasibleError(f"histogram of block {b}, projection {p} is empty")
    for b, p in zip(*np.nonzero(sparse & (bins >= _FINITE_BINS - 1)), strict=True):
        raise InfeasibleError(f"scores of block {b}, projection {p} are not finite at sparsity {sparsities[b, p]}")
    edges, at = bin_edges(), np.where(sparse, bins, 0)
    share = (sparsities * totals - below) / np.maximum(inside, 1)
    found = edges[at] + share * (edges[at + 1] - edges[at])
    return np.where(sparse, found, 0.0).astype(np.float32)
