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

import numpy as np

from was_search.masks.backward import opened, recomputes
from was_search.masks.corrections import LearnedCorrections
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import DeviceHistograms, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.slope_point import SlopePoint
from was_search.masks.slope_sums import WINDOW, Slopes, Window, slopes_of
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import EvaluationProtocol, TokenSet

BOUNDARY_WIDTH = 0.5
"""Half width of the band around a threshold, as a share of the threshold; 0 is plain autograd."""

GPU_FLOP = 2e13
"""Work of a backward pass that keeps a GPU busy: sequences are taken together until a pass has so much.

A pass over fewer waits for launches and memory instead, so that small models' passes are not worth dividing among
workers; a large model's are of single sequences, and memory is that of one.
"""

CPU_FLOP = 1.4e10
"""The same on a CPU, some 0.3 s of a core: passes of half as many sequences of the demo take 1.03 to 1.1 times as long.
"""


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
    return slopes_of(
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
