"""What backward passes of slopes find: at which window, as sums of parts, and as slopes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from was_search.compensation import Vector
from was_search.masks.histogram import DeviceHistograms, Histograms, PackedCounts, no_counts
from was_search.masks.slope_point import SlopePoint
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import EvaluationProtocol

WINDOW = 0.04
"""Half width of the window of sparsity over which a slope is taken."""


@dataclass(frozen=True)
class Slopes:
    """The slopes that one pass found, and what it learnt besides.

    Attributes:
        slopes: nats per token for one unit of each projection's sparsity, float64 [L, 7]; that of a shared mask is
            divided among its projections by parameters.
        histograms: of the scores before masking, outside the dense prefix.
        nats: mean loss of the pass, nats per predicted token: the NLL, or the divergence from the dense model.
        tokens: tokens of the pass, in all positions; forward and backward cost about three times as many.
    """

    slopes: FloatArray
    histograms: DeviceHistograms
    nats: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Window:
    """Where slopes are taken: the masks' thresholds, and the window of each projection.

    Attributes:
        thresholds: the masks', and the scores between which channels count, float32 [L, 7, 3].
        widths: of the windows in sparsity, float64 [L, 7].
    """

    thresholds: npt.NDArray[np.float32]
    widths: FloatArray

    @classmethod
    def around(cls, sparsities: FloatArray, histograms: Histograms | DeviceHistograms, half: float = WINDOW) -> Window:
        """The windows of half width ``half`` around ``sparsities`` [L, 7], cut off at 0 and 0.99.

        Raises:
            InfeasibleError: sparsities outside [0, 1), or scores that are not finite.
        """
        lower, upper = (np.clip(sparsities + off, 0.0, 0.99) for off in (-half, half))
        thresholds = np.stack([histograms.thresholds(point) for point in (sparsities, lower, upper)], axis=-1)
        return cls(thresholds, np.maximum(upper - lower, 1e-9))


@dataclass(frozen=True, eq=False)
class SlopeSums:
    """What the backward passes of some sequences add up to.

    Attributes:
        change: of the loss over each projection's window, nats, float64 [L, 7]; of a shared mask at its first member.
        counts: of the scores.
        nats: the loss.
        gradient: in the flat values of the compensation that is learned, float32; empty where none is.
    """

    change: FloatArray
    counts: PackedCounts
    nats: float
    gradient: Vector

    @classmethod
    def of(cls, point: SlopePoint) -> SlopeSums:
        gradient = np.zeros(0, np.float32) if point.learned is None else point.learned.gradient()
        return cls(point.change(), PackedCounts.of(point.counts()), float(point.nats), gradient)


class SumsOfParts:
    """What the parts of a pass add up to, to the bit as one worker adds them, whichever comes first.

    Args:
        n_blocks: L.
    """

    def __init__(self, n_blocks: int) -> None:
        self._counts = no_counts(n_blocks)
        self._parts: dict[int, SlopeSums] = {}

    def __len__(self) -> int:
        """Parts that have come."""
        return len(self._parts)

    def add(self, part: int, sums: SlopeSums) -> None:
        """Take in what the part of that number found."""
        sums.counts.add_to(self._counts)
        self._parts[part] = replace(sums, counts=_NOTHING)  # floats are added in order, and last

    @property
    def gradient(self) -> Vector:
        """As :class:`SlopeSums` has it, of all parts."""
        parts = self._ordered
        total = np.zeros_like(parts[0].gradient)
        for part in parts:
            total += part.gradient
        return total

    def slopes(self, shape: ModelShape, window: Window, protocol: EvaluationProtocol, sequences: int) -> Slopes:
        """The slopes of a pass over so many sequences of ``protocol``; asked for once, when all parts have come."""
        parts = self._ordered
        change, nats = np.zeros_like(parts[0].change), 0.0
        for part in parts:
            change, nats = change + part.change, nats + part.nats
        return slopes_of(shape, window, protocol, sequences, change=change, counts=self._counts, nats=nats)

    @property
    def _ordered(self) -> list[SlopeSums]:
        return [self._parts[number] for number in sorted(self._parts)]


_NOTHING = PackedCounts(np.zeros(0, np.int32), np.zeros(0, np.int32))


def slopes_of(
    shape: ModelShape,
    window: Window,
    protocol: EvaluationProtocol,
    sequences: int,
    *,
    change: FloatArray,
    counts: Tensor,
    nats: float,
) -> Slopes:
    n_tokens = sequences * protocol.predicted_per_sequence
    for group in shape.groups:
        if len(group) > 1:
            counts[:, list(group)] = counts[:, [group[0]]]
    slopes = shape.divided(change) / n_tokens / window.widths
    return Slopes(slopes, DeviceHistograms(counts), nats / n_tokens, sequences * protocol.sequence_length)
