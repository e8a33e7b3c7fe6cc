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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from was_search.backward import backward_pass
from was_search.histogram import N_BINS, Histograms, bin_counts
from was_search.score import MaskOp, mask_input, scores
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray
from was_search.structure import Structure

BOUNDARY_WIDTH = 0.5
"""Half width of the band around a threshold, as a share of the threshold; 0 is plain autograd."""

WINDOW = 0.04
"""Half width of the window of sparsity over which a slope is taken."""


@dataclass(frozen=True)
class Slopes:
    """What one pass found.

    Attributes:
        slopes: nats per token for one unit of each projection's sparsity, float64 [L, 7]; that of a shared mask is
            divided among its projections by parameters.
        histograms: of the scores before masking, outside the dense prefix.
        nats: mean loss of the pass, nats per predicted token.
        tokens: of the pass, in all positions; forward and backward cost about three times as many.
    """

    slopes: FloatArray
    histograms: Histograms
    nats: float
    tokens: int


def slope_pass(
    model: nn.Module,
    structure: Structure,
    norms: list[list[Tensor]],
    tokens: IntArray,
    sparsities: FloatArray,
    histograms: Histograms,
    *,
    batch_size: int,
    dense_prefix: int,
    predicted: int,
    width: float = BOUNDARY_WIDTH,
    window: float = WINDOW,
    recompute: bool = False,
    mask_op: MaskOp = mask_input,
    op: SlopeOp | None = None,
) -> Slopes:
    """Slopes at nominal ``sparsities`` [L, 7], with thresholds from ``histograms``.

    Args:
        model: a causal LM; its parameters may be frozen.
        structure: its blocks.
        norms: from ``structure_norms``.
        tokens: [n, sequence_length].
        sparsities: the point.
        histograms: taken at or near the point.
        batch_size: sequences per forward and backward.
        dense_prefix: positions at a sequence's start that are never masked.
        predicted: tokens predicted in one sequence, from its end.
        width: see :data:`BOUNDARY_WIDTH`.
        window: see :data:`WINDOW`; it is cut off at sparsity 0 and 0.99.
        recompute: keep the activations of one block at a time, for one more forward.
        mask_op: a fused replacement of :func:`was_search.score.mask_input`.
        op: a fused replacement of :func:`slope_terms`.

    Raises:
        InfeasibleError: sparsities outside [0, 1), or scores that are not finite.
    """
    lower = np.clip(sparsities - window, 0.0, 0.99)
    upper = np.clip(sparsities + window, 0.0, 0.99)
    thresholds = np.stack([histograms.thresholds(point) for point in (sparsities, lower, upper)], axis=-1)
    # Blocks may lie on several devices; what is learnt of a block lies on its own.
    devices = [norms[b][0].device for b in range(len(structure.blocks))]
    limits = [torch.as_tensor(thresholds[b], device=device) for b, device in enumerate(devices)]
    changes = [torch.zeros(N_PROJECTIONS, dtype=torch.float64, device=device) for device in devices]
    counts = [torch.zeros((N_PROJECTIONS, N_BINS), dtype=torch.int64, device=device) for device in devices]

    def masked(b: int, p: int, x: Tensor) -> Tensor:
        mask = _Mask(float(thresholds[b, p, 0]), width, dense_prefix, changes[b][p], counts[b][p], mask_op, op)
        return _Masked.apply(x, norms[b][p], limits[b][p], mask)  # type: ignore[no-any-return, no-untyped-call]

    nats = backward_pass(
        model, structure, tokens, masked, batch_size=batch_size, predicted=predicted, recompute=recompute
    )
    n_tokens = len(tokens) * predicted
    change = torch.stack([part.cpu() for part in changes]).numpy()
    slopes = structure.shape.divided(change) / n_tokens / np.maximum(upper - lower, 1e-9)
    counted = structure.shape.copied(torch.stack([part.cpu() for part in counts]).numpy())
    return Slopes(slopes, Histograms(counted), nats / n_tokens, int(tokens.size))


SlopeOp = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor, Tensor]]
"""What :func:`slope_terms` does; a fused one may take its place."""


def slope_terms(
    x: Tensor, gradient: Tensor, norms: Tensor, limits: Tensor, width: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of one mask: the gradient passed on with the band's term, and what is learnt on the way.

    Args:
        x: [sequences, positions, d], the input before masking.
        gradient: like x, of the loss at the masked input.
        norms: [d] float32.
        limits: float32 [3]: the threshold, and the scores between which the slope is taken.
        width: see :data:`BOUNDARY_WIDTH`.
        prefix: positions that are never masked.

    Returns:
        The gradient at x, in the gradient's dtype; the change of the loss when the channels between the limits are
        dropped, float64 scalar; counts of the scores behind the prefix, int64 [32768].
    """
    threshold, low, high = limits
    score = scores(x[:, prefix:], norms)
    body = gradient[:, prefix:].float()
    inside = (score >= low) & (score < high)
    zero = torch.zeros((), device=x.device)
    change = -torch.where(inside, body * x[:, prefix:].float(), zero).sum(dtype=torch.float64)
    factor = (score >= threshold).float()
    reach = width * threshold
    # Not times a mask: an infinite score outside of the band would become NaN.
    factor += torch.where((score - threshold).abs() < reach, score, zero) / (2.0 * reach).clamp_min(1e-30)
    passed = torch.cat([gradient[:, :prefix], (body * factor).to(gradient.dtype)], dim=1)
    return passed, change, bin_counts(score)


@dataclass(frozen=True)
class _Mask:
    """One projection's mask, and where its backward adds what it finds."""

    threshold: float
    width: float
    prefix: int
    change: Tensor
    counts: Tensor
    mask_op: MaskOp = mask_input
    op: SlopeOp | None = None


class _Masked(torch.autograd.Function):
    """The hard mask; its backward takes slopes and histograms and passes the gradient on with the band's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Tensor, limits: Tensor, mask: _Mask) -> Tensor:
        ctx.save_for_backward(x, norms, limits)
        ctx.mask = mask
        if mask.threshold <= 0.0:
            return x.view_as(x)
        return mask.mask_op(x, norms, mask.threshold, mask.prefix)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mask: _Mask = ctx.mask
        x, norms, limits = ctx.saved_tensors
        passed, change, counts = (mask.op or slope_terms)(x, gradient, norms, limits, mask.width, mask.prefix)
        mask.change.add_(change)
        mask.counts.add_(counts)
        return passed, None, None, None


class SlopeOracle:
    """Slopes on demand for one model: every call takes the next sequences and renews the histograms.

    Owned by one thread. The same arguments and calls give the same slopes.

    Args:
        model: a causal LM.
        structure: its blocks.
        norms: from ``structure_norms``.
        tokens: [n, sequence_length], what the sequences are drawn from.
        histograms: taken near the first point; the dense model's do.
        per_call: sequences of one call.
        batch_size: sequences per forward and backward.
        dense_prefix: positions at a sequence's start that are never masked.
        predicted: tokens predicted in one sequence.
        seed: of the order in which sequences come; all are used before one comes again.
        recompute: see :func:`slope_pass`; so for the ops.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        norms: list[list[Tensor]],
        tokens: IntArray,
        histograms: Histograms,
        *,
        per_call: int,
        batch_size: int,
        dense_prefix: int,
        predicted: int,
        seed: int,
        recompute: bool = False,
        mask_op: MaskOp = mask_input,
        op: SlopeOp | None = None,
    ) -> None:
        self._model, self._structure, self._norms = model, structure, norms
        self._tokens = tokens
        self._histograms = histograms
        self._per_call = min(per_call, len(tokens))
        self._options: dict[str, Any] = {
            "batch_size": batch_size,
            "dense_prefix": dense_prefix,
            "predicted": predicted,
            "recompute": recompute,
            "mask_op": mask_op,
            "op": op,
        }
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []
        self.tokens_seen = 0

    def __call__(self, sparsities: FloatArray) -> FloatArray:
        """Slopes [L, 7] at ``sparsities`` [L, 7], nats per token and unit of sparsity."""
        while len(self._order) < self._per_call:
            self._order.extend(self._rng.permutation(len(self._tokens)).tolist())
        chosen, self._order = self._order[: self._per_call], self._order[self._per_call :]
        found = slope_pass(
            self._model,
            self._structure,
            self._norms,
            self._tokens[chosen],
            sparsities,
            self._histograms,
            **self._options,
        )
        self._histograms = found.histograms
        self.tokens_seen += found.tokens
        return found.slopes
