"""Correct the outputs of masked tokens by a compensation, in plain torch, and take the loss's gradient in it.

:mod:`was_search.compensation` says what a compensation is. Products are float32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from was_search.checkpoints.structure import Structure, device_of
from was_search.compensation import Compensation, Vector

CorrectOp = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A function like :func:`correct`; a fused one may take its place."""

CorrectionTermsOp = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""A function like :func:`correction_terms`; a fused one may take its place."""


def correct(y: Tensor, scale: Tensor, constant: Tensor, prefix: int) -> Tensor:
    """``scale * y + constant`` after the prefix, in y's dtype.

    Args:
        y: [sequences, positions, d].
        scale: float32 [d].
        constant: float32 [d].
        prefix: positions at a sequence's start that are left as they are.
    """
    return _with_prefix(y, torch.addcmul(constant, y, scale).to(y.dtype), prefix)


def correction_terms(y: Tensor, gradient: Tensor, scale: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The backward of :func:`correct`: the gradient at y, like y, and that in scale and constant, float32 [2, d].

    Args:
        y: what was corrected.
        gradient: of the corrected one, like y.
        scale: float32 [d].
        prefix: positions at a sequence's start that were left as they are.
    """
    body = gradient[:, prefix:].to(torch.promote_types(gradient.dtype, torch.float32))
    sums = torch.stack([(body * y[:, prefix:]).sum((0, 1)), body.sum((0, 1))])
    return _with_prefix(gradient, (gradient * scale).to(gradient.dtype), prefix), sums.float()


def _with_prefix(before: Tensor, after: Tensor, prefix: int) -> Tensor:
    """``after`` with the first ``prefix`` positions of ``before``; both [batch, positions, d]."""
    return torch.cat([before[:, :prefix], after[:, prefix:]], dim=1) if prefix else after


@dataclass(frozen=True, eq=False)
class Correction:
    """The scale and the constant of one linear map's outputs, each float32 [out_features] on the map's device."""

    scale: Tensor
    constant: Tensor
    op: CorrectOp = correct

    def __call__(self, y: Tensor, prefix: int) -> Tensor:
        """The output y [batch, positions, out_features] with all positions after the prefix corrected."""
        return self.op(y, self.scale, self.constant, prefix)


Corrections = Sequence[Callable[[Tensor, int], Tensor]]
"""One for every linear map that a forward calls, in the order of :func:`linear_maps`; of a fused map, one for all."""


def linear_maps(structure: Structure) -> list[tuple[int, tuple[int, ...], Any]]:
    """Block, projections and module of every linear map that a forward calls; a fused map has several projections."""
    maps: list[tuple[int, tuple[int, ...], Any]] = []
    for masked in structure.inputs():
        if len(masked.linears) == len(masked.members):
            maps.extend((masked.block, (p,), linear) for p, linear in zip(masked.members, masked.linears, strict=True))
        else:
            maps.append((masked.block, masked.members, masked.linears[0]))
    return maps


def corrections(structure: Structure, compensation: Compensation, op: CorrectOp = correct) -> list[Correction]:
    """The compensation's vectors where the weights are."""

    def there(rows: Any, block: int, members: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.tensor(np.concatenate([rows[block][p] for p in members]), device=device)

    return [
        Correction(
            there(compensation.scales, b, members, device_of(linear)),
            there(compensation.constants, b, members, device_of(linear)),
            op,
        )
        for b, members, linear in linear_maps(structure)
    ]


@contextmanager
def corrected_outputs(structure: Structure, by: Corrections | None, prefix: int) -> Iterator[None]:
    """While open, outputs of the linear maps are corrected after the prefix; None corrects nothing."""
    maps = linear_maps(structure) if by is not None else []
    handles = [
        linear.register_forward_hook(lambda _, __, y, one=one: one(y, prefix))
        for (_, _, linear), one in zip(maps, by or (), strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Learned(Correction):
    """A :class:`Correction` whose backward adds the loss's gradient in both vectors to ``sums``.

    Attributes:
        sums: float32 [2, out_features]: the gradient in the scale and in the constant.
        terms: gives it.
    """

    sums: Tensor = field(kw_only=True)
    terms: CorrectionTermsOp = correction_terms

    def __call__(self, y: Tensor, prefix: int) -> Tensor:
        return _Learned.apply(y, self, prefix)  # type: ignore[no-any-return, no-untyped-call]


class _Learned(torch.autograd.Function):
    """A correction that is learned; autograd itself would hold more, and twice where blocks are recomputed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, by: Learned, prefix: int) -> Tensor:
        ctx.save_for_backward(y)
        ctx.by, ctx.prefix = by, prefix
        return by.op(y, by.scale, by.constant, prefix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (y,), by = ctx.saved_tensors, ctx.by
        passed, sums = by.terms(y, gradient, by.scale, ctx.prefix)
        by.sums.add_(sums)
        return passed, None, None


class LearnedCorrections:
    """A :class:`Learned` for every linear map, as :func:`linear_maps` has them, whose vectors lie side by side.

    Each device has all vectors in one tensor, laid out like :meth:`was_search.compensation.Compensation.flat`, so that
    they are written and read at once.

    Args:
        structure: whose maps.
        op: corrects outputs.
        terms: the backward of that.
    """

    def __init__(
        self, structure: Structure, op: CorrectOp = correct, terms: CorrectionTermsOp = correction_terms
    ) -> None:
        maps = linear_maps(structure)
        widths = [sum(structure.shape.out_features[b][p] for p in members) for b, members, _ in maps]
        devices = [device_of(linear) for _, _, linear in maps]
        self._vectors = {device: torch.zeros((2, sum(widths)), device=device) for device in devices}
        self._sums = {device: torch.zeros_like(vectors) for device, vectors in self._vectors.items()}
        split = {
            device: (torch.split(self._vectors[device], widths, 1), torch.split(self._sums[device], widths, 1))
            for device in self._vectors
        }
        self.each: list[Learned] = []
        for number, device in enumerate(devices):
            (scale, constant), sums = (parts[number] for parts in split[device])
            self.each.append(Learned(scale, constant, op, sums=sums, terms=terms))

    def start(self, flat: Vector) -> None:
        """Take over the vectors of ``flat``; the gradient is zero again."""
        for device, vectors in self._vectors.items():
            vectors.copy_(torch.tensor(flat).view_as(vectors))  # Ray's values may not be written to
            self._sums[device].zero_()

    def start_like(self, other: LearnedCorrections) -> None:
        """Take over the vectors of another one of the same structure."""
        for device, vectors in self._vectors.items():
            vectors.copy_(other._vectors[device])
            self._sums[device].zero_()

    def add(self, other: LearnedCorrections) -> None:
        """Add the gradient of ``other``."""
        for device, sums in self._sums.items():
            sums += other._sums[device]

    def gradient(self) -> Vector:
        """The gradient since :meth:`start`, laid out like what that takes."""
        # A map's sums lie on its own device; they are zero on the others.
        total = sum(sums.cpu() for sums in self._sums.values())
        assert isinstance(total, Tensor)
        found: Vector = total.flatten().numpy()
        return found


def output_spreads(structure: Structure, forward: Callable[[], object]) -> Vector:
    """Root mean square of the outputs of each linear map while ``forward`` runs the model, for each output of it.

    Laid out like the scales of :meth:`was_search.compensation.Compensation.flat`, float32.
    """
    maps = linear_maps(structure)
    squares = [torch.zeros(2, dtype=torch.float64, device=device_of(linear)) for _, _, linear in maps]

    def add(y: Tensor, to: Tensor) -> None:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        to += torch.stack([wide.square().sum(dtype=torch.float64), to.new_tensor(float(y.numel()))])

    handles = [
        linear.register_forward_hook(lambda _, __, y, to=to: add(y, to))
        for (_, _, linear), to in zip(maps, squares, strict=True)
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for (block, members, _), (total, n) in zip(maps, (one.tolist() for one in squares), strict=True):
        for p in members:
            found[block, p] = np.full(structure.shape.out_features[block][p], (total / max(n, 1.0)) ** 0.5, np.float32)
    return np.concatenate([found[key] for key in sorted(found)])
