"""One sparse map of weights as stored or rounded, and what float64 makes of it, with the error that it may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from tests.kernels.gemv_group import rounded
from tests.kernels.where import INTERPRETER
from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.correction import Correction
from was_kernels.ops.reference import sparse_gemv_reference
from was_kernels.ops.sparse_gemv import Tiling as Tiling
from was_kernels.ops.sparse_gemv import _launch, sparse_gemv
from was_search.checkpoints.rounding import dequantise

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(33, 1), (127, 65), (300, 200), (64, 128), (1, 7)]
"""[d_in, d_out]: odd rows, also of packed bytes, short groups, several tiles."""


def combinations(*rows: int) -> list[tuple[torch.dtype, int, int, int]]:
    """dtype, d_in, d_out and ``rows``: all on a GPU, a third in the slow interpreter, where all pairs still meet."""
    numbered = product(enumerate(DTYPES), enumerate(SHAPES), enumerate(rows))
    return [
        (dtype, *shape, n) for (i, dtype), (j, shape), (k, n) in numbered if not INTERPRETER or (i + j + k) % 3 == 0
    ]


@dataclass
class Case:
    """Inputs on the device."""

    x: Tensor
    weight: ColumnWeight
    norms: Tensor
    bias: Tensor | None
    vectors: tuple[Tensor, Tensor] | None = None

    def sparse(self, threshold: float) -> SparseMap:
        correction = None if self.vectors is None else Correction.of(*self.vectors, self.bias)
        return SparseMap(self.weight, self.norms, threshold, self.bias, correction)

    @property
    def dense(self) -> Tensor:
        """The weight that is meant, [d_out, d_in] float64."""
        w = self.weight
        if w.scales is None:
            return w.columns.double().t()
        return dequantise(w.columns, w.scales, w.bits, w.group, w.width).double().t()

    def quantile(self, sparsity: float) -> float:
        scores = self.x.abs().float() * self.norms
        return float(scores.flatten().sort().values[int(sparsity * (scores.numel() - 1))])

    def run(self, threshold: float, dense: Tensor | None = None) -> Tensor:
        found = sparse_gemv(self.x, self.sparse(threshold), dense)
        if not INTERPRETER:  # which runs one program after another: nothing could change their order
            again = sparse_gemv(self.x, self.sparse(threshold), dense)
            assert torch.equal(found.view(torch.uint8), again.view(torch.uint8))  # to the bit, NaN included
        return found

    def cut(self, threshold: float, tiling: Tiling) -> Tensor:
        return _launch(self.x, self.sparse(threshold), None, tiling)

    def reference(self, threshold: float) -> Tensor:
        return sparse_gemv_reference(self.x, self.sparse(threshold))

    def check(self, found: Tensor, threshold: float, dense: Tensor | None = None) -> None:
        """The mask is made in float32, as the op defines it."""
        keep = self.x.abs().float() * self.norms >= threshold
        if threshold <= 0.0:
            keep = torch.ones_like(keep)
        if dense is not None:
            keep |= dense[:, None]
        x, weight = torch.where(keep, self.x, 0.0).double(), self.dense
        bias = torch.zeros((), dtype=torch.float64, device=x.device) if self.bias is None else self.bias.double()
        y = x @ weight.t() + bias
        # n float32 additions, each rounded by at most 2**-24 (tensor cores may truncate: 2**-23) of a partial sum that
        # never exceeds the sum of magnitudes; a rounded weight is itself rounded once when it is written out; then one
        # rounding to the output's dtype, up to a whole unit in the last place, since the interpreter truncates to
        # bfloat16.
        magnitude = x.abs() @ weight.abs().t() + bias.abs()
        if self.vectors is not None:  # twice the roundings: the constant has one of its own, and so has the product
            scale, constant = (vector.double() for vector in self.vectors)
            corrected, most = scale * y + constant, 2.0 * (scale.abs() * magnitude + constant.abs())
            masked = torch.ones(len(y), 1, dtype=torch.bool, device=y.device) if dense is None else ~dense[:, None]
            y, magnitude = torch.where(masked, corrected, y), torch.where(masked, most, magnitude)
        rounded_too = self.weight.scales is not None
        bound = (x.shape[1] + (4 if rounded_too else 2)) * 2.0**-23 * magnitude
        bound = bound + torch.finfo(self.x.dtype).eps * y.abs() + (1e-6 if rounded_too else 1e-7)
        assert found.shape == y.shape and found.dtype == self.x.dtype
        error = (found.double() - y).abs()
        assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.2f} times the bound"


def case(
    rows: int,
    d_in: int,
    d_out: int,
    device: torch.device,
    *,
    bits: int = 16,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    corrected: bool = False,
    group: int = 64,
) -> Case:
    """Random inputs; ``bits`` of 16 is a weight of ``dtype`` as stored."""
    made = torch.Generator().manual_seed(rows * 7 + d_in)
    x = torch.randn(rows, d_in, generator=made).to(dtype)
    weight = torch.randn(d_out, d_in, generator=made)
    offset = torch.randn(d_out, generator=made).to(device, dtype) if bias else None
    if bits == 16:
        held = ColumnWeight.as_stored(weight.t().to(device, dtype).contiguous())
    else:
        held = rounded(weight, bits, group, device)
    drawn = torch.randn(2, d_out, generator=made).to(device)
    vectors = (1.0 + drawn[0] / 8, drawn[1]) if corrected else None
    found = Case(x.to(device), held, torch.empty(0), offset, vectors)
    return replace(found, norms=found.dense.norm(dim=0).float())
