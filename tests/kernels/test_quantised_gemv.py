"""The sparse GEMV on rounded weights against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.where import need_kernels
from was_kernels.quantised_gemv import _launch, quantised_gemv, tiling
from was_kernels.quantised_weight import QuantisedWeight
from was_kernels.reference import quantised_gemv_reference
from was_kernels.sparse_gemv import Tiling
from was_search.rounding import dequantise, quantise
from was_search.weight_format import WeightFormat

need_kernels()

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(33, 1), (127, 65), (300, 200), (64, 128), (1, 7)]
"""[d_in, d_out]: odd rows of packed bytes, short groups, several tiles."""


@dataclass
class Case:
    """Inputs on the device and what float64 makes of them."""

    x: Tensor
    weight: QuantisedWeight
    norms: Tensor
    bias: Tensor | None

    @property
    def dense(self) -> Tensor:
        """[d_out, d_in] float64."""
        w = self.weight
        return dequantise(w.packed, w.scales, w.bits, w.group, w.width).double().t()

    def quantile(self, sparsity: float) -> float:
        scores = self.x.abs().float() * self.norms
        return float(scores.flatten().sort().values[int(sparsity * (scores.numel() - 1))])

    def run(self, threshold: float, dense: Tensor | None = None) -> Tensor:
        found = quantised_gemv(self.x, self.weight, self.norms, threshold, self.bias, dense)
        again = quantised_gemv(self.x, self.weight, self.norms, threshold, self.bias, dense)
        assert torch.equal(found.view(torch.uint8), again.view(torch.uint8))  # to the bit, NaN included
        return found

    def reference(self, threshold: float) -> Tensor:
        w = self.weight
        return quantised_gemv_reference(
            self.x, w.packed, w.scales, w.bits, w.group, w.width, self.norms, threshold, self.bias
        )

    def check(self, found: Tensor, threshold: float, dense: Tensor | None = None) -> None:
        keep = self.x.abs().float() * self.norms >= threshold
        if threshold <= 0.0:
            keep = torch.ones_like(keep)
        if dense is not None:
            keep |= dense[:, None]
        x, weight = torch.where(keep, self.x, 0.0).double(), self.dense
        bias = torch.zeros((), dtype=torch.float64, device=x.device) if self.bias is None else self.bias.double()
        y = x @ weight.t() + bias
        # n float32 additions of products of a weight that itself is rounded once, then one rounding to the output's
        # dtype, up to a whole unit in the last place, since the interpreter truncates to bfloat16.
        magnitude = x.abs() @ weight.abs().t() + bias.abs()
        bound = (x.shape[1] + 4) * 2.0**-23 * magnitude + torch.finfo(self.x.dtype).eps * y.abs() + 1e-6
        assert found.shape == y.shape and found.dtype == self.x.dtype
        error = (found.double() - y).abs()
        assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.2f} times the bound"


def case(
    rows: int,
    d_in: int,
    d_out: int,
    bits: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    group: int = 64,
) -> Case:
    made = torch.Generator().manual_seed(rows * 7 + d_in)
    x = torch.randn(rows, d_in, generator=made).to(dtype)
    packed, scales = quantise(torch.randn(d_out, d_in, generator=made), WeightFormat(bits, group))
    offset = torch.randn(d_out, generator=made).to(dtype) if bias else None
    norms = dequantise(packed, scales, bits, group, d_out).norm(dim=1)
    weight = QuantisedWeight(packed.to(device), scales.to(device), bits, group, d_out)
    return Case(x.to(device), weight, norms.to(device), None if offset is None else offset.to(device))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_against_float64(device, dtype, d_in, d_out, rows, bits):
    c = case(rows, d_in, d_out, bits, device, dtype=dtype, bias=rows % 2 == 1)
    for sparsity in (0.0, 0.6) if rows < 16 else (0.9,):
        threshold = c.quantile(sparsity) if sparsity else 0.0
        c.check(c.run(threshold), threshold)
        c.check(c.reference(threshold), threshold)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 96, 128])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_group_has_its_own_scale(device, bits, group, rows):
    c = case(rows, 70, 300, bits, device, group=group)
    c.weight.scales.mul_(torch.rand_like(c.weight.scales, dtype=torch.float32).half() + 0.5)
    threshold = c.quantile(0.5)
    c.check(c.run(threshold), threshold)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_ties_are_kept(device, rows, bits):
    c = case(rows, 65, 33, bits, device)
    c.x.copy_(torch.where(torch.rand_like(c.x) < 0.5, 0.5, 0.25))
    c.norms.fill_(0.5)
    assert torch.equal(c.run(0.125), c.run(0.0))
    c.check(c.run(0.25), 0.25)
    assert c.run(0.25 + 2**-24).count_nonzero() == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_everything_dropped_leaves_the_bias(device, rows, bits):
    c = case(rows, 127, 65, bits, device, dtype=torch.float16, bias=True)
    found = c.run(1e9)
    assert c.bias is not None and torch.equal(found, c.bias.expand(rows, -1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_dropped_weights_and_scales_are_not_read(device, rows, bits):
    # NaN scales in the channels that every row drops: a kernel that read them would return NaN.
    c = case(rows, 300, 65, bits, device)
    threshold = c.quantile(0.8)
    dropped = ((c.x.abs().float() * c.norms) < threshold).all(dim=0)
    assert 0 < int(dropped.sum()) < 300
    expected = c.run(threshold)
    c.weight.scales[dropped] = NAN
    assert torch.equal(c.run(threshold), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_nan_and_inf(device, rows, bits):
    c = case(rows, 65, 33, bits, device)
    c.x[0, 7] = NAN  # its score is NaN: dropped
    found = c.run(0.5)
    c.x[0, 7] = 0.0
    assert torch.equal(found, c.run(0.5))
    c.x[0, 7] = NAN
    assert c.run(0.0)[0].isnan().all()  # nothing is dropped at zero
    c.x[0, 7] = INF  # kept: its sign is that of the weight
    found = c.run(0.5)
    assert torch.equal(found[0], torch.where(c.dense[:, 7] > 0, INF, -INF).float())
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_dense_rows_keep_every_channel(device, rows, bits):
    c = case(rows, 127, 65, bits, device, bias=True)
    threshold = c.quantile(0.7)
    for flags in (torch.ones(rows), torch.arange(rows) % 2 == 0, torch.zeros(rows)):
        dense = flags.bool().to(device)
        c.check(c.run(threshold, dense), threshold, dense)


@pytest.mark.parametrize("bits", [8, 4])
def test_strided_rows_and_an_empty_batch(device, bits):
    c = case(4, 128, 64, bits, device)
    expected = c.run(0.5)
    wide = torch.zeros(4, 256, device=device)
    wide[:, ::2] = c.x
    assert torch.equal(quantised_gemv(wide[:, ::2], c.weight, c.norms, 0.5), expected)
    assert quantised_gemv(c.x[:0], c.weight, c.norms, 0.5).shape == (0, 64)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_tiling_gives_the_same_sum(device, rows, bits):
    c = case(rows, 300, 200, bits, device)
    for cut in (Tiling(32, 32, 1, 10, 4), Tiling(64, 32, 10, 1, 4), Tiling(32, 64, 2, 3, 4)):
        c.check(_launch(c.x, c.weight, c.norms, 0.5, None, None, cut), 0.5)


def test_tiles_lie_within_groups():
    for rows in (1, 4):
        for group in (32, 96, 128, 4096):
            weight = QuantisedWeight(torch.empty(4096, 1), torch.empty(0), 4, group, 11008)
            assert group % tiling(rows, weight, 132).block_out == 0


def test_other_inputs_are_refused(device):
    c = case(2, 64, 64, 4, device)
    w = c.weight
    for weight, message in [
        (QuantisedWeight(w.packed[:, :-1], w.scales, 4, 64, 64), r"packed: contiguous uint8 \[64, 32\] needed"),
        (QuantisedWeight(w.packed, w.scales.float(), 4, 64, 64), r"scales: contiguous float16 \[64, 1, 2\] needed"),
        (QuantisedWeight(w.packed, w.scales, 4, 48, 64), "a multiple of 32 needed, got 4 and 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantised_gemv(c.x, weight, c.norms, 0.5)
    with pytest.raises(ValueError, match=r"norms: contiguous float32 \[64\] needed"):
        quantised_gemv(c.x, w, c.norms.double(), 0.5)
    with pytest.raises(ValueError, match=r"dense: contiguous bool \[2\] needed"):
        quantised_gemv(c.x, w, c.norms, 0.5, dense=torch.ones(3, dtype=torch.bool, device=device))
