from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.where import need_kernels
from was_kernels.reference import sparse_gemv_reference
from was_kernels.sparse_gemv import Tiling, _launch, choose_tiling, sparse_gemv

need_kernels()

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(33, 1), (127, 65), (300, 200), (64, 128), (1, 7)]


@dataclass
class Case:
    """Inputs on the device and what float64 makes of them, with the error that float32 sums may have."""

    x: Tensor
    weight: Tensor
    norms: Tensor
    bias: Tensor | None

    @property
    def weight_t(self) -> Tensor:
        return self.weight.t().contiguous()

    def quantile(self, sparsity: float) -> float:
        scores = self.x.abs().float() * self.norms
        return float(scores.flatten().sort().values[int(sparsity * (scores.numel() - 1))])

    def exact(self, threshold: float, dense: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, bound of its error) in float64; the mask is made in float32, as the op defines it."""
        keep = self.x.abs().float() * self.norms >= threshold
        if threshold <= 0.0:
            keep = torch.ones_like(keep)
        if dense is not None:
            keep |= dense[:, None]
        x = torch.where(keep, self.x, 0.0).double()
        weight = self.weight.double()
        bias = torch.zeros((), dtype=torch.float64, device=x.device) if self.bias is None else self.bias.double()
        # n float32 additions, each rounded by at most 2**-24 (tensor cores may truncate: 2**-23) of a partial
        # sum that never exceeds the sum of magnitudes; then one rounding to the output's dtype, again up to
        # a whole unit in the last place, since the interpreter truncates to bfloat16.
        magnitude = x.abs() @ weight.abs().t() + bias.abs()
        y = x @ weight.t() + bias
        bound = (x.shape[1] + 2) * 2.0**-23 * magnitude + torch.finfo(self.x.dtype).eps * y.abs() + 1e-7
        return y, bound

    def check(self, found: Tensor, threshold: float, dense: Tensor | None = None) -> None:
        y, bound = self.exact(threshold, dense)
        assert found.shape == y.shape and found.dtype == self.x.dtype
        error = (found.double() - y).abs()
        assert bool((error <= bound).all()), f"error {error.max():.3g}, {(error / bound).max():.2f} times the bound"


def case(
    rows: int,
    d_in: int,
    d_out: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d_in, generator=generator).to(dtype)
    weight = torch.randn(d_out, d_in, generator=generator).to(dtype)
    offset = torch.randn(d_out, generator=generator).to(dtype) if bias else None
    norms = weight.float().norm(dim=0)
    return Case(x.to(device), weight.to(device), norms.to(device), None if offset is None else offset.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17])
def test_against_float64(device, dtype, d_in, d_out, rows):
    c = case(rows, d_in, d_out, dtype, device, bias=rows % 2 == 1)
    for sparsity in (0.0, 0.6) if rows < 16 else (0.9,):
        threshold = c.quantile(sparsity) if sparsity else 0.0
        found = sparse_gemv(c.x, c.weight_t, c.norms, threshold, c.bias)
        c.check(found, threshold)
        c.check(sparse_gemv_reference(c.x, c.weight, c.norms, threshold, c.bias), threshold)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_ties_are_kept(device, rows):
    c = case(rows, 65, 33, torch.float32, device)
    c.x.copy_(torch.where(torch.rand_like(c.x) < 0.5, 0.5, 0.25))
    c.norms.fill_(0.5)
    full = sparse_gemv(c.x, c.weight_t, c.norms, 0.0)
    assert torch.equal(sparse_gemv(c.x, c.weight_t, c.norms, 0.125), full)
    c.check(sparse_gemv(c.x, c.weight_t, c.norms, 0.25), 0.25)
    nothing = sparse_gemv(c.x, c.weight_t, c.norms, 0.25 + 2**-24)
    assert nothing.count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_everything_dropped_leaves_the_bias(device, rows):
    c = case(rows, 127, 65, torch.float16, device, bias=True)
    found = sparse_gemv(c.x, c.weight_t, c.norms, 1e9, c.bias)
    assert c.bias is not None and torch.equal(found, c.bias.expand(rows, -1))
    zero = torch.zeros_like(c.x)
    assert torch.equal(sparse_gemv(zero, c.weight_t, c.norms, 0.1, c.bias), found)
    assert sparse_gemv(zero, c.weight_t, c.norms, 0.0).count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_dropped_weights_are_not_read(device, rows):
    # NaN weights in the channels that every row drops: a kernel that read them would return NaN.
    c = case(rows, 300, 65, torch.float32, device)
    threshold = c.quantile(0.8)
    dropped = ((c.x.abs().float() * c.norms) < threshold).all(dim=0)
    assert 0 < int(dropped.sum()) < 300
    expected = sparse_gemv(c.x, c.weight_t, c.norms, threshold)
    poisoned = c.weight.clone()
    poisoned[:, dropped] = NAN
    assert torch.equal(sparse_gemv(c.x, poisoned.t().contiguous(), c.norms, threshold), expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(device, rows, dtype):
    c = case(rows, 65, 33, dtype, device)
    c.x[0, 7] = NAN  # its score is NaN: dropped
    clean = c.x.clone()
    clean[0, 7] = 0.0
    found = sparse_gemv(c.x, c.weight_t, c.norms, 0.5)
    assert torch.equal(found, sparse_gemv(clean, c.weight_t, c.norms, 0.5))
    assert sparse_gemv(c.x, c.weight_t, c.norms, 0.0)[0].isnan().all()  # nothing is dropped at zero
    clean[0, 7] = INF  # kept: its sign is that of the weight
    found = sparse_gemv(clean, c.weight_t, c.norms, 0.5)
    assert torch.equal(found[0], torch.where(c.weight[:, 7] > 0, INF, -INF).to(dtype))
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_dense_rows_keep_every_channel(device, rows):
    c = case(rows, 127, 65, torch.float32, device, bias=True)
    threshold = c.quantile(0.7)
    for flags in (
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows) % 2 == 0,
        torch.zeros(rows, dtype=torch.bool),
    ):
        dense = flags.to(device)
        found = sparse_gemv(c.x, c.weight_t, c.norms, threshold, c.bias, dense)
        c.check(found, threshold, dense)
    assert torch.equal(found, sparse_gemv(c.x, c.weight_t, c.norms, threshold, c.bias))


@pytest.mark.parametrize("rows", [1, 5])
def test_the_cut_does_not_matter(device, rows):
    c = case(rows, 300, 200, torch.float32, device, bias=True)
    threshold = c.quantile(0.5)
    for tiling in (
        Tiling(64, 16, 19, 1, 4),
        Tiling(32, 32, 1, 10, 4),
        Tiling(256, 64, 2, 3, 4),
        Tiling(64, 32, 7, 2, 8),
    ):
        c.check(_launch(c.x, c.weight_t, c.norms, threshold, c.bias, None, tiling), threshold)


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (33, 200), (4096, 4096), (11008, 4096), (128256, 8192)])
def test_tiling_covers_the_channels(rows, d_in, d_out):
    for processors in (1, 2, 132):
        for itemsize in (2, 4):
            cut = choose_tiling(rows, d_in, d_out, itemsize, processors)
            assert cut.splits >= 1
            assert cut.splits * cut.steps * cut.block_in >= d_in
            assert (cut.splits - 1) * cut.steps * cut.block_in < d_in  # no program without work
            for size in (cut.block_in, cut.block_out):
                assert size & (size - 1) == 0


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_same_bits_every_time(device, rows):
    c = case(rows, 513, 96, torch.float16, device)
    threshold = c.quantile(0.5)
    first = sparse_gemv(c.x, c.weight_t, c.norms, threshold)
    for _ in range(3):
        assert torch.equal(sparse_gemv(c.x, c.weight_t, c.norms, threshold), first)


def test_strided_inputs(device):
    c = case(4, 66, 33, torch.float32, device)
    wide = torch.randn(4, 3, 66, device=device)
    wide[:, 1] = c.x
    expected = sparse_gemv(c.x, c.weight_t, c.norms, 4.0)
    assert torch.equal(sparse_gemv(wide[:, 1], c.weight_t, c.norms, 4.0), expected)
    columns = c.x.t().contiguous().t()
    assert columns.stride() == (1, 4)
    assert torch.equal(sparse_gemv(columns, c.weight_t, c.norms, 4.0), expected)
    assert torch.equal(
        sparse_gemv(columns[1:2], c.weight_t, c.norms, 4.0), sparse_gemv(c.x[1:2], c.weight_t, c.norms, 4.0)
    )
    assert sparse_gemv(c.x[:0], c.weight_t, c.norms, 4.0).shape == (0, 33)


def test_the_registered_op(device):
    c = case(3, 65, 33, torch.float32, device, bias=True)
    dense = torch.tensor([True, False, False], device=device)
    for arguments in (
        (c.x, c.weight_t, c.norms, 4.0, c.bias, dense),
        (c.x[:1], c.weight_t, c.norms, 4.0, None, None),
    ):
        torch.library.opcheck(
            torch.ops.was.sparse_gemv.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        assert torch.equal(torch.ops.was.sparse_gemv(*arguments), sparse_gemv(*arguments))


def test_refusals(device):
    c = case(2, 33, 7, torch.float32, device)
    with pytest.raises(ValueError, match=r"x: \[B, d_in\] and weight_t \[d_in, d_out\] needed"):
        sparse_gemv(c.x, c.weight, c.norms, 1.0)
    with pytest.raises(ValueError, match=r"weight_t: must be contiguous .* got strides \(1, 33\)"):
        sparse_gemv(c.x, c.weight.t(), c.norms, 1.0)
    with pytest.raises(ValueError, match=r"weight_t: must have x's dtype torch.float16, got torch.float32"):
        sparse_gemv(c.x.half(), c.weight_t, c.norms, 1.0)
    with pytest.raises(ValueError, match=r"norms: contiguous float32 \[33\] needed, got torch.float16"):
        sparse_gemv(c.x, c.weight_t, c.norms.half(), 1.0)
    with pytest.raises(ValueError, match=r"bias: contiguous \[7\] needed, got \[33\]"):
        sparse_gemv(c.x, c.weight_t, c.norms, 1.0, c.norms)
    with pytest.raises(ValueError, match=r"dense: contiguous bool \[2\] needed, got torch.float32 \[33\]"):
        sparse_gemv(c.x, c.weight_t, c.norms, 1.0, None, c.norms)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "d_out"), [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_cuda_graph_at_model_size(cuda, rows, dtype, d_in, d_out):
    c = case(rows, d_in, d_out, dtype, cuda)
    threshold = c.quantile(0.6)
    weight_t = c.weight_t
    sparse_gemv(c.x, weight_t, c.norms, threshold)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_gemv(c.x, weight_t, c.norms, threshold)
    c.x.copy_(torch.randn_like(c.x))
    graph.replay()
    c.check(y, threshold)
    first = y.clone()
    graph.replay()
    assert torch.equal(y, first)
