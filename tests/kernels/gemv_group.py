"""Random inputs of one launch of sparse projections, of weights as stored or rounded, and what float64 makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.correction import Correction
from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_launch import new_workspace
from was_kernels.ops.gather_step import GatherStep
from was_search.checkpoints.rounding import dequantise, quantise
from was_search.weight_format import WeightFormat

HALF = [torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


def rounded(weight: Tensor, bits: int, group: int, device: Any = None) -> ColumnWeight:
    """``weight`` [out, in] in ``bits`` bits."""
    packed, scales = quantise(weight, WeightFormat(bits, group))
    return ColumnWeight(packed.to(device), scales.to(device), bits, group, len(weight))


class Group:
    """Random inputs of one launch; ``bits`` of 16 are weights as stored, ``corrected`` gives scales and constants.

    Attributes:
        weights: what the op reads.
        floats: what it means, [d_in, width] each.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        rows: int,
        d_in: int,
        widths: list[int],
        bits: int = 16,
        *,
        group: int = 64,
        bias: bool = False,
        corrected: bool = False,
    ) -> None:
        made = torch.Generator().manual_seed(rows * 7919 + d_in * 31 + sum(widths))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made).to(device, dtype)

        self.x = random(rows, d_in)
        if bits == 16:
            self.hold([random(d_in, width) / d_in**0.5 for width in widths])
        else:
            drawn = [torch.randn(width, d_in, generator=made) / d_in**0.5 for width in widths]
            self.weights = [rounded(weight, bits, group, device) for weight in drawn]
            self.floats = [
                dequantise(w.columns, w.scales, bits, group, w.width) for w in self.weights if w.scales is not None
            ]
        self.norms = [weight.float().norm(dim=1) for weight in self.floats]
        self.biases: list[Tensor | None] = [random(width) if bias else None for width in widths]
        self.norm_weight = 1.0 + random(d_in) / 8
        self.residual = random(rows, sum(widths))
        self.workspace = new_workspace(torch.device(device))
        drawn = [[torch.randn(2, width, generator=made).to(device) for width in widths] for _ in range(corrected)]
        self.vectors = [(1.0 + pair[0] / 8, pair[1] / 4) for pairs in drawn for pair in pairs]

    def hold(self, floats: list[Tensor]) -> None:
        """Take these weights as stored, [d_in, width] each."""
        self.floats = floats
        self.weights = [ColumnWeight.as_stored(weight) for weight in floats]

    def normed(self, epsilon: float) -> Tensor:
        """x after the RMSNorm."""
        wide = self.x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return self.norm_weight * (wide * scale).to(self.x.dtype)

    def thresholds(self, sparsity: float, x: Tensor | None = None) -> list[float]:
        x = self.x if x is None else x
        return [float((x.float().abs() * norms).flatten().nanquantile(sparsity)) for norms in self.norms]

    def exact(self, thresholds: list[float], dense: Tensor | None = None, x: Tensor | None = None) -> list[Tensor]:
        """Outputs of the projections in float64, the masks made in float32 as the op defines them."""
        x = self.x if x is None else x
        found = []
        for weight, norms, threshold, bias in zip(self.floats, self.norms, thresholds, self.biases, strict=True):
            keep = x.float().abs() * norms >= threshold
            keep = torch.ones_like(keep) if threshold <= 0.0 else keep
            keep = keep if dense is None else keep | dense[:, None]
            y = torch.where(keep, x, 0.0).double() @ weight.double()
            found.append(y if bias is None else y + bias.double())
        for i, (scale, constant) in enumerate(self.vectors):
            corrected = scale.double() * found[i] + constant.double()
            found[i] = corrected if dense is None else torch.where(dense[:, None], found[i], corrected)
        return found

    def step(self, thresholds: list[float], **options: Any) -> GatherStep:
        biases = self.biases
        given = [Correction.of(*pair, bias) for pair, bias in zip(self.vectors, biases, strict=False)]
        corrections = given or [None] * len(biases)
        maps = [SparseMap(*of) for of in zip(self.weights, self.norms, thresholds, biases, corrections, strict=True)]
        return GatherStep(self.x, maps, **options)

    def run(self, thresholds: list[float], **options: Any) -> Tensor:
        step = self.step(thresholds, **options)
        found = gather_gemv(step, self.workspace)
        again = gather_gemv(step, self.workspace, early=True)
        assert torch.equal(found.view(torch.int16), again.view(torch.int16))  # to the bit, NaN included
        assert not self.workspace.any()
        return found


def close(found: Tensor, exact: Tensor, scale: float = 4.0) -> None:
    """A few roundings to the dtype of what was found."""
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=scale * unit, atol=scale * unit)
