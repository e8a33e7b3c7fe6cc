"""Projections of one input in one weight, as serving engines hold them: q, k and v, or gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_step import GatherStep
from was_kernels.ops.reference import score_mask_reference
from was_kernels.runtime.masked_group import MaskedGroup
from was_kernels.runtime.sparse_linear import DENSE_ABOVE, SparseLinear, Vectors, norms_like


@dataclass(frozen=True)
class Part:
    """One projection of a weight.

    Attributes:
        width: its outputs, rows of the weight.
        norms: float32 [d].
        threshold: the score under which a channel is dropped; zero drops nothing.
        sparsity: share of channels that are dropped, nominally.
        compensation: of its outputs; None: they are not corrected. All parts of a weight have one, or none has.
    """

    width: int
    norms: Tensor
    threshold: float
    sparsity: float
    compensation: Vectors | None = None

    def masks_like(self, other: Part) -> bool:
        """Whether both keep the same channels of any input."""
        return self.threshold == other.threshold and torch.equal(self.norms, other.norms)

    def beside(self, other: Part) -> Part:
        """Both as one, which has the masks of both."""
        joined = None
        if self.compensation is not None and other.compensation is not None:
            (scale, constant), (its_scale, its_constant) = self.compensation, other.compensation
            joined = torch.cat((scale, its_scale)), torch.cat((constant, its_constant))
        return replace(self, width=self.width + other.width, compensation=joined)


class SideBySide:
    """Linear maps of one input, their outputs side by side; neighbours with equal masks are held as one map.

    Args:
        weight: [sum of widths, d], which is copied: it may be freed afterwards.
        parts: by rows of the weight.
        workspace: of :func:`was_kernels.ops.gather_launch.new_workspace`, to use the CUDA kernel where it fits; None:
            never.
        bias: [sum of widths], which whoever calls adds to every product; None: nothing.
    """

    def __init__(
        self, weight: Tensor, parts: Sequence[Part], *, workspace: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        self._parts = _merged(parts if bias is None else _before_bias(parts, bias))
        rows = torch.split(weight.detach(), [part.width for part in self._parts])
        self.maps = [_sparse(*pair, workspace) for pair in zip(rows, self._parts, strict=True)]
        on_cpu = all(held.bags is not None for held in self.maps)
        dropped = sum(part.width * part.sparsity for part in self._parts) / sum(part.width for part in self._parts)
        self._bags = MaskedGroup(self.maps, dropped) if on_cpu else None
        gathers = len(self.maps) <= 3 and all(held.workspace is not None for held in self.maps)
        self._workspace = workspace if gathers else None
        self._worth: dict[tuple[int, int], bool] = {}

    def step(self, x: Tensor, dense: Tensor | None = None) -> Tensor:
        """The masked and corrected product of one-token rows x [B, d], or the dense one of too many of them.

        Args:
            x: [B, d].
            dense: bool [B]: rows that keep every channel and are not corrected; None: none are.

        Returns:
            [B, sum of widths] in x's dtype.
        """
        if not self.is_worth(x.shape[0]):
            return self.whole(x)
        if self._bags is not None:
            return self._bags.beside(x, dense)
        if self._workspace is not None:
            return gather_gemv(GatherStep(x, [held.sparse for held in self.maps], dense=dense), self._workspace)
        return _beside([_masked(x, held, dense) for held in self.maps])

    def whole(self, x: Tensor) -> Tensor:
        """The dense product of x [n, d]: [n, sum of widths]."""
        if self._bags is not None:
            return self._bags.beside(x, None, skip=False)
        return _beside([held.held.multiply(x, None) for held in self.maps])

    def is_worth(self, rows: int) -> bool:
        """Whether a step of so many rows is masked: one row always is, more where it was measured to be faster.

        On a CPU each row reads its own channels, so that the answer depends on the sparsity; on a GPU rows share them.
        """
        if rows <= 1 or rows > DENSE_ABOVE or self._bags is None:
            return 1 <= rows <= DENSE_ABOVE
        key = rows, torch.get_num_threads()
        if key not in self._worth:
            self._worth[key] = self._bags.compiles(rows) or all(
                self._reads_less(*pair, *key) for pair in zip(self.maps, self._parts, strict=True)
            )
        return self._worth[key]

    def _reads_less(self, held: SparseLinear, part: Part, rows: int, threads: int) -> bool:
        assert held.bags is not None
        return part.threshold <= 0.0 or rows * (1.0 - part.sparsity) * held.in_features <= held.bags.most(rows, threads)


def _merged(parts: Sequence[Part]) -> list[Part]:
    merged: list[Part] = []
    for part in parts:
        if merged and part.masks_like(merged[-1]):
            merged[-1] = merged[-1].beside(part)
        else:
            merged.append(part)
    return merged


def _sparse(rows: Tensor, part: Part, workspace: Tensor | None) -> SparseLinear:
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows, requires_grad=False)
    norms = norms_like(part.norms, rows.device)
    return SparseLinear(
        linear,
        norms,
        part.threshold,
        prefix=None,
        triton=False,
        workspace=workspace,
        cpu=rows.device.type == "cpu",
        compensation=part.compensation,
    )


def _masked(x: Tensor, held: SparseLinear, dense: Tensor | None) -> Tensor:
    y = held.held.multiply(score_mask_reference(x, held.norms, held.threshold, dense), None)
    correction = held.correction
    return y if correction is None else correction.applied(y, None, dense)


def _before_bias(parts: Sequence[Part], bias: Tensor) -> list[Part]:
    """Parts whose products are as compensated once ``bias`` is added: ``scale * (y + bias) + constant`` less it."""
    return [
        part if part.compensation is None else replace(part, compensation=_less(*part.compensation, own))
        for part, own in zip(parts, torch.split(bias.detach(), [part.width for part in parts]), strict=True)
    ]


def _less(scale: Tensor, constant: Tensor, bias: Tensor) -> Vectors:
    return scale, torch.addcmul(constant, scale - 1.0, bias.to(constant))


def _beside(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)
