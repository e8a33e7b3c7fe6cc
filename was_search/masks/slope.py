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

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from was_search.masks.backward import backward_pass
from was_search.masks.corrections import Corrections
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import N_BINS, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.ops import PLAIN, Ops
from was_search.shape import N_PROJECTIONS, FloatArray
from was_search.texts.protocol import TokenSet

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
    histograms: Histograms
    nats: float
    tokens: int


def slope_pass(
    model: MaskedModel,
    data: TokenSet,
    sparsities: FloatArray,
    histograms: Histograms,
    *,
    width: float = BOUNDARY_WIDTH,
    window: float = WINDOW,
    corrections: Corrections | None = None,
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
        corrections: of outputs; None: the model's own, if it has any.
        top: the dense model's top of all sequences of ``data``; makes the divergence from it the loss.

    Raises:
        InfeasibleError: sparsities outside [0, 1), or scores that are not finite.
    """
    lower = np.clip(sparsities - window, 0.0, 0.99)
    upper = np.clip(sparsities + window, 0.0, 0.99)
    thresholds = np.stack([histograms.thresholds(point) for point in (sparsities, lower, upper)], axis=-1)
    # Blocks may lie on several devices; what is learnt of a block lies on its device.
    devices, norms, prefix = model.block_devices, model.norms, data.protocol.dense_prefix
    limits = [torch.as_tensor(thresholds[b], device=device) for b, device in enumerate(devices)]
    changes = [torch.zeros(N_PROJECTIONS, dtype=torch.float64, device=device) for device in devices]
    counts = [torch.zeros((N_PROJECTIONS, N_BINS), dtype=torch.int64, device=device) for device in devices]

    def masked(b: int, p: int, x: Tensor) -> Tensor:
        mask = _Mask(float(thresholds[b, p, 0]), width, prefix, changes[b][p], counts[b][p], model.ops)
        return _Masked.apply(x, norms[b][p], limits[b][p], mask)  # type: ignore[no-any-return, no-untyped-call]

    nats = backward_pass(model, data, masked, corrections=corrections, top=top)
    n_tokens = len(data.tokens) * data.protocol.predicted_per_sequence
    change = torch.stack([part.cpu() for part in changes]).numpy()
    slopes = model.shape.divided(change) / n_tokens / np.maximum(upper - lower, 1e-9)
    counted = model.shape.copied(torch.stack([part.cpu() for part in counts]).numpy())
    return Slopes(slopes, Histograms(counted), nats / n_tokens, int(data.tokens.size))


@dataclass(frozen=True)
class _Mask:
    """One projection's mask, and where its backward adds what it finds."""

    threshold: float
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
        if mask.threshold <= 0.0:
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
    """

    def __init__(self, model: MaskedModel, data: TokenSet, histograms: Histograms, *, per_call: int, seed: int) -> None:
        self._model, self._data = model, data
        self._histograms = histograms
        self._per_call = min(per_call, len(data.tokens))
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []
        self.tokens_seen = 0

    def __call__(self, sparsities: FloatArray) -> FloatArray:
        """Slopes [L, 7] at ``sparsities`` [L, 7], nats per token and unit of sparsity."""
        while len(self._order) < self._per_call:
            self._order.extend(self._rng.permutation(len(self._data.tokens)).tolist())
        chosen, self._order = self._order[: self._per_call], self._order[self._per_call :]
        found = slope_pass(self._model, self._data.part(chosen), sparsities, self._histograms)
        self._histograms = found.histograms
        self.tokens_seen += found.tokens
        return found.slopes
