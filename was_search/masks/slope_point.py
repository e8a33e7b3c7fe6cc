"""What backward passes through masks read and add to, and the mask whose backward finds it.

:mod:`was_search.masks.slope` says what slopes are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from was_search.masks.corrections import Corrections, LearnedCorrections
from was_search.masks.histogram import N_BINS
from was_search.masks.masked_model import MaskedModel
from was_search.masks.ops import PLAIN, Ops
from was_search.shape import N_PROJECTIONS, FloatArray
from was_search.texts.protocol import EvaluationProtocol


class SlopePoint:
    """What backward passes read and add to: thresholds and corrections, slopes, score counts, nats and gradients.

    Blocks may lie on several devices; what belongs to a block lies on its device.

    Args:
        model: whose passes.
        protocol: of the text.
        width: half width of the band.
        learned: corrections of outputs, which get their gradient; None: the model's own, if it has any.

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

    def another(self) -> SlopePoint:
        """One for passes of the same kind, with corrections of its own where they are learned."""
        learned = None if self.learned is None else self._model.learned_corrections()
        return SlopePoint(self._model, self.protocol, self.width, learned)

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

    def counts(self) -> Tensor:
        """Of the scores, int64 [L, 7, 32768] on the first block's device; of a shared mask at its first member."""
        return _together(self._counts.values(), self._devices[0])


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
