"""The slope of the loss in every projection's sparsity at a sparse point: one backward pass.

Raising a projection's sparsity drops the channels whose score is next above its threshold. To first order that
changes the loss by ``- sum_j g_j x_j`` over these, with g the loss's gradient at the masked input x. The slope is
this sum over a window of sparsity, divided by the window's width.

The gradient itself has to pass the masks of all later projections. A hard mask ``m(x) = x [s >= t]`` of a channel
with score s has the derivative ``[s >= t] + s d(s - t)`` with Dirac's d: a small change upstream moves channels
across the threshold, and each jump is as large as the channel. Autograd sees the first term only; on the demo
checkpoint its slopes are too small three- to fivefold, and not evenly. Here the second term is estimated from the
channels in a band around the threshold, as a kernel density estimate: ``s / (2 w t)`` where ``abs(s - t) < w t``.
(The same trick, a surrogate derivative of a step, trains spiking networks: Neftci et al., IEEE SPM 2019.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from was_search.compensation import Vector
from was_search.masks.backward import opened, recomputes
from was_search.masks.corrections import LearnedCorrections
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import DeviceHistograms, Histograms, PackedCounts, no_counts
from was_search.masks.masked_model import MaskedModel
from was_search.masks.slope_point import SlopePoint
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import EvaluationProtocol, TokenSet

BOUNDARY_WIDTH = 0.5
"""Half width of the band around a threshold, as a share of the threshold; 0 is plain autograd."""

WINDOW = 0.04
"""Half width of the window of sparsity over which a slope is taken."""


GPU_FLOP = 2e13
"""Work of a backward pass that keeps a GPU busy: sequences are taken together until a pass has so much.

A pass over fewer waits for launches and memory instead, so that small models' passes are not worth dividing among
workers; a large model's are of single sequences, and memory is that of one.
"""

CPU_FLOP = 1.4e10
"""The same on a CPU, some 0.3 s of a core: passes of half as many sequences of the demo take 1.03 to 1.1 times as long.
"""


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
        return _slopes(shape, window, protocol, sequences, change=change, counts=self._counts, nats=nats)

    @property
    def _ordered(self) -> list[SlopeSums]:
        return [self._parts[number] for number in sorted(self._parts)]


_NOTHING = PackedCounts(np.zeros(0, np.int32), np.zeros(0, np.int32))


def _slopes(
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


def sequences_together(shape: ModelShape, protocol: EvaluationProtocol, *, gpu: bool) -> int:
    """How many sequences one backward pass takes at once, on a GPU or on a CPU."""
    enough = GPU_FLOP if gpu else CPU_FLOP
    return max(1, min(protocol.batch_size, math.ceil(enough / _sequence_flop(shape, protocol))))


def part_flop(shape: ModelShape, protocol: EvaluationProtocol, *, gpu: bool) -> float:
    """Floating-point operations of the products of one such pass, forward and backward."""
    return sequences_together(shape, protocol, gpu=gpu) * _sequence_flop(shape, protocol)


def _sequence_flop(shape: ModelShape, protocol: EvaluationProtocol) -> float:
    return 6.0 * float(shape.params.sum()) * protocol.sequence_length


def slope_pass(
    model: MaskedModel,
    data: TokenSet,
    sparsities: FloatArray,
    histograms: Histograms | DeviceHistograms,
    *,
    width: float = BOUNDARY_WIDTH,
    window: float = WINDOW,
    learned: LearnedCorrections | None = None,
    top: DenseTop | None = None,
) -> Slopes:
    """Slopes at nominal ``sparsities`` [L, 7], with thresholds from ``histograms``.

    Args:
        model: its parameters may be frozen.
        data: the sequences of the pass.
        sparsities: the point.
        histograms: taken at or near the point.
        width: half width of the band, :data:`BOUNDARY_WIDTH`.
        window: half width of the window, :data:`WINDOW`; it is cut off at sparsity 0 and 0.99.
        learned: corrections of outputs, which get their gradient; None: the model's own, if it has any.
        top: the dense model's top of all sequences of ``data``; makes the divergence from it the loss.

    Raises:
        InfeasibleError: sparsities outside [0, 1), or scores that are not finite.
    """
    around = Window.around(sparsities, histograms, window)
    point = slope_point(model, data, around, width=width, learned=learned, top=top)
    return _slopes(
        *(model.shape, around, data.protocol, len(data.tokens)),
        change=point.change(),
        counts=point.counts(),
        nats=float(point.nats),
    )


def slope_point(
    model: MaskedModel,
    data: TokenSet,
    window: Window,
    *,
    width: float,
    learned: LearnedCorrections | None = None,
    top: DenseTop | None = None,
) -> SlopePoint:
    """The backward passes of ``data`` at a window, and what they found; arguments as in :func:`slope_pass`."""
    point = SlopePoint(model, data.protocol, width, learned)
    point.start(window.thresholds)
    batches, done = [], 0
    for batch in model.batches(data, sequences_together(model.shape, data.protocol, gpu=model.device.type != "cpu")):
        batches.append((batch, None if top is None else top[done : done + len(batch)].rows(batch.device)))
        done += len(batch)
    if model.graphs is None or not model.graphs.add_batches(model, point, batches):
        recompute = recomputes(model, batches[0][0].numel())
        with opened(model, data.protocol, point.masked, point.corrections, recompute) as backward:
            for batch, rows in batches:
                point.nats.add_(backward(batch, rows))
    return point


class SequenceDraws:
    """Draws the sequences of one pass after another: all are used before one comes again.

    Args:
        n: sequences that there are.
        each: of a pass, at most ``n``.
        seed: decides their order.
    """

    def __init__(self, n: int, each: int, seed: int) -> None:
        self._n = n
        self._each = min(each, n)
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []

    def next(self) -> list[int]:
        """The sequences of the next pass."""
        while len(self._order) < self._each:
            self._order.extend(self._rng.permutation(self._n).tolist())
        chosen, self._order = self._order[: self._each], self._order[self._each :]
        return chosen


class SlopeOracle:
    """Slopes on demand for one model: every call takes the next sequences and renews the histograms.

    Owned by one thread. The same arguments and calls give the same slopes.

    Args:
        model: the model to take slopes of.
        data: what the sequences are drawn from.
        histograms: taken near the first point; the dense model's will do.
        per_call: sequences of one call.
        seed: decides the order of the sequences; all are used before one comes again.
        width: half width of the band.
    """

    def __init__(
        self,
        model: MaskedModel,
        data: TokenSet,
        histograms: Histograms,
        *,
        per_call: int,
        seed: int,
        width: float = BOUNDARY_WIDTH,
    ) -> None:
        self._model, self._data = model, data
        self._histograms: Histograms | DeviceHistograms = histograms
        self._width = width
        self._draws = SequenceDraws(len(data.tokens), per_call, seed)
        self.tokens_seen = 0

    def __call__(self, sparsities: FloatArray) -> FloatArray:
        """Slopes [L, 7] at ``sparsities`` [L, 7], nats per token and unit of sparsity."""
        chosen = self._data.part(self._draws.next())
        found = slope_pass(self._model, chosen, sparsities, self._histograms, width=self._width)
        self._histograms = found.histograms
        self.tokens_seen += found.tokens
        return found.slopes
