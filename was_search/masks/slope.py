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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from was_search.masks.backward import opened, recomputes
from was_search.masks.corrections import Corrections, LearnedCorrections
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import N_BINS, DeviceHistograms, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.ops import PLAIN, Ops
from was_search.shape import N_PROJECTIONS, FloatArray
from was_search.texts.protocol import EvaluationProtocol, TokenSet

BOUNDARY_WIDTH = 0.5
"""Half width of the band around a threshold, as a share of the threshold; 0 is plain autograd."""

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
    lower = np.clip(sparsities - window, 0.0, 0.99)
    upper = np.clip(sparsities + window, 0.0, 0.99)
    thresholds = np.stack([histograms.thresholds(point) for point in (sparsities, lower, upper)], axis=-1)
    point = SlopePoint(model, data.protocol, width, learned)
    point.start(thresholds)
    batches, done = [], 0
    for batch in model.batches(data):
        batches.append((batch, None if top is None else top[done : done + len(batch)].rows(batch.device)))
        done += len(batch)
    if model.graphs is None or not model.graphs.add_batches(model, data, point, batches):
        with opened(model, data, point.masked, point.corrections, recomputes(model, data)) as backward:
            for batch, rows in batches:
                point.nats.add_(backward(batch, rows))
    n_tokens = len(data.tokens) * data.protocol.predicted_per_sequence
    slopes = model.shape.divided(point.change()) / n_tokens / np.maximum(upper - lower, 1e-9)
    return Slopes(slopes, point.histograms(), float(point.nats) / n_tokens, int(data.tokens.size))


class SlopePoint:
    """What backward passes read and add to: thresholds and corrections, slopes, score counts, nats and gradients.

    Blocks may lie on several devices; what belongs to a block lies on its device.

    Args:
        model: whose passes.
        protocol: of the text.
        width: half width of the band.
        learned: as in :func:`slope_pass`.

    Attributes:
        width: as given.
        protocol: as given.
        learned: as given.
        corrections: of the outputs.
        nats: summed loss, float64 scalar.
    """

    def __init__(
        self, model: MaskedModel, protocol: EvaluationProtocol, width: float, learned: LearnedCorrections | None
    ) -> None:
        self._model = model
        self._devices = model.block_devices
        shape = (len(self._devices), N_PROJECTIONS)
        where = dict.fromkeys(self._devices)
        self._thresholds = np.zeros(shape, np.float32)
        self._limits = {device: torch.zeros((*shape, 3), device=device) for device in where}
        self._changes = {device: torch.zeros(shape, dtype=torch.float64, device=device) for device in where}
        self._counts = {device: torch.zeros((*shape, N_BINS), dtype=torch.int64, device=device) for device in where}
        self.width, self.protocol, self.learned = width, protocol, learned
        self.corrections: Corrections | None = model.corrections if learned is None else learned.each
        self.nats = torch.zeros((), dtype=torch.float64, device=model.device)

    def start(self, thresholds: npt.NDArray[np.float32]) -> None:
        """Begin at ``thresholds``: masks', and the scores between which slopes are taken, float32 [L, 7, 3]."""
        self._thresholds = thresholds[..., 0]
        for limits in self._limits.values():
            limits.copy_(torch.from_numpy(thresholds))

    def start_like(self, other: SlopePoint) -> None:
        """Begin where ``other`` did, with its corrections; asks the host for nothing."""
        self._thresholds = other._thresholds
        for device, limits in self._limits.items():
            limits.copy_(other._limits[device])
        for sums in (*self._changes.values(), *self._counts.values(), self.nats):
            sums.zero_()
        if self.learned is not None and other.learned is not None:
            self.learned.start_like(other.learned)

    def add(self, other: SlopePoint) -> None:
        """Add what ``other`` has found."""
        for device in self._limits:
            self._changes[device] += other._changes[device]
            self._counts[device] += other._counts[device]
        self.nats += other.nats
        if self.learned is not None and other.learned is not None:
            self.learned.add(other.learned)

    def masked(self, b: int, p: int, x: Tensor) -> Tensor:
        """A projection's input under its mask: an :data:`was_search.masks.inputs.InputFunction`."""
        device, model = self._devices[b], self._model
        limits = self._limits[device][b, p]
        # A CUDA graph reads thresholds where they lie; on a CPU a number saves passes over the input.
        threshold = limits[0] if device.type == "cuda" else float(self._thresholds[b, p])
        changes, counts = self._changes[device][b, p], self._counts[device][b, p]
        mask = _Mask(threshold, self.width, self.protocol.dense_prefix, changes, counts, model.ops)
        return _Masked.apply(x, model.norms[b][p], limits, mask)  # type: ignore[no-any-return, no-untyped-call]

    def change(self) -> FloatArray:
        """Change of the summed loss over each projection's window, float64 [L, 7]."""
        found: FloatArray = _together(self._changes.values(), torch.device("cpu")).numpy()
        return found

    def histograms(self) -> DeviceHistograms:
        """Those of the scores."""
        counts = _together(self._counts.values(), self._devices[0])
        for group in self._model.shape.groups:
            counts[:, list(group)] = counts[:, [group[0]]]
        return DeviceHistograms(counts)


def _together(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of what several devices hold; each has zeros where another one's blocks are."""
    first, *others = (part.to(device) for part in parts)
    for part in others:
        first = first + part
    return first


@dataclass(frozen=True)
class _Mask:
    """One projection's mask, and where its backward adds what it finds."""

    threshold: float | Tensor
    width: float
    prefix: int
    change: Tensor
    counts: Tensor
    ops: Ops = PLAIN


class _Masked(torch.autograd.Function):
    """The hard mask; its backward takes slopes and histograms and passes the gradient on with the band's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Tensor, limits: Tensor, mask: _Mask) -> Tensor:
        ctx.save_for_backward(x, norms, limits)
        ctx.mask = mask
        if isinstance(mask.threshold, float) and mask.threshold <= 0.0:
            return x.view_as(x)
        return mask.ops.mask(x, norms, mask.threshold, mask.prefix)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mask: _Mask = ctx.mask
        x, norms, limits = ctx.saved_tensors
        passed, change, counts = mask.ops.slope(x, gradient, norms, limits, mask.width, mask.prefix)
        mask.change.add_(change)
        mask.counts.add_(counts)
        return passed, None, None, None


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
        self._per_call = min(per_call, len(data.tokens))
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []
        self.tokens_seen = 0

    def __call__(self, sparsities: FloatArray) -> FloatArray:
        """Slopes [L, 7] at ``sparsities`` [L, 7], nats per token and unit of sparsity."""
        while len(self._order) < self._per_call:
            self._order.extend(self._rng.permutation(len(self._data.tokens)).tolist())
        chosen, self._order = self._order[: self._per_call], self._order[self._per_call :]
        found = slope_pass(self._model, self._data.part(chosen), sparsities, self._histograms, width=self._width)
        self._histograms = found.histograms
        self.tokens_seen += found.tokens
        return found.slopes
