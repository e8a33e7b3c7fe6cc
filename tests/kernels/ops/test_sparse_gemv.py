"""The sparse GEMV on weights as stored against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.gemv_case import DTYPES, Case, Tiling, case, combinations
from tests.kernels.gemv_group import INF, NAN
from tests.kernels.where import need_kernels
from was_kernels.ops.column_weight import ColumnWeight
from was_kernels.ops.sparse_gemv import choose_tiling, sparse_gemv

need_kernels()


@pytest.mark.parametrize(("dtype", "d_in", "d_out", "rows"), combinations(1, 2, 3, 5, 16, 17))
def test_against_float64(device, dtype, d_in, d_out, rows):
    c = case(rows, d_in, d_out, device, dtype=dtype, bias=rows % 2 == 1)
    for sparsity in (0.0, 0.6) if rows < 16 else (0.9,):
        threshold = c.quantile(sparsity) if sparsity else 0.0
        found = c.run(threshold)
        c.check(found, threshold)
        c.check(c.reference(threshold), threshold)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_ties_are_kept(device, rows):
    c = case(rows, 65, 33, device)
    c.x.copy_(torch.where(torch.rand_like(c.x) < 0.5, 0.5, 0.25))
    c.norms.fill_(0.5)
    full = c.run(0.0)
    assert torch.equal(c.run(0.125), full)
    c.check(c.run(0.25), 0.25)
    nothing = c.run(0.25 + 2**-24)
    assert nothing.count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_everything_dropped_leaves_the_bias(device, rows):
    c = case(rows, 127, 65, device, dtype=torch.float16, bias=True)
    found = c.run(1e9)
    assert c.bias is not None and torch.equal(found, c.bias.expand(rows, -1))
    zero = torch.zeros_like(c.x)
    assert torch.equal(replace(c, x=zero).run(0.1), found)
    assert replace(c, x=zero, bias=None).run(0.0).count_nonzero() == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_dropped_weights_are_not_read(device, rows):
    # NaN weights in the channels that every row drops: a kernel that read them would return NaN.
    c = case(rows, 300, 65, device)
    threshold = c.quantile(0.8)
    dropped = ((c.x.abs().float() * c.norms) < threshold).all(dim=0)
    assert 0 < int(dropped.sum()) < 300
    expected = c.run(threshold)
    c.weight.columns[dropped] = NAN
    assert torch.equal(c.run(threshold), expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf(device, rows, dtype):
    c = case(rows, 65, 33, device, dtype=dtype)
    c.x[0, 7] = NAN  # its score is NaN: dropped
    clean = c.x.clone()
    clean[0, 7] = 0.0
    found = c.run(0.5)
    assert torch.equal(found, replace(c, x=clean).run(0.5))
    assert c.run(0.0)[0].isnan().all()  # nothing is dropped at zero
    clean[0, 7] = INF  # kept: its sign is that of the weight
    found = replace(c, x=clean).run(0.5)
    assert torch.equal(found[0], torch.where(c.dense[:, 7] > 0, INF, -INF).to(dtype))
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_dense_rows_keep_every_channel(device, rows):
    c = case(rows, 127, 65, device, bias=True)
    threshold = c.quantile(0.7)
    for flags in (
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows) % 2 == 0,
        torch.zeros(rows, dtype=torch.bool),
    ):
        dense = flags.to(device)
        found = c.run(threshold, dense)
        c.check(found, threshold, dense)
    assert torch.equal(found, c.run(threshold))


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_masked_rows_are_corrected(device, rows, bias):
    c = case(rows, 127, 65, device, dtype=torch.float16, bias=bias, corrected=True)
    for threshold in (c.quantile(0.6), 0.0):
        for dense in (None, torch.arange(rows, device=device) % 2 == 1):
            c.check(c.run(threshold, dense), threshold, dense)
    c.check(c.reference(threshold), threshold)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_cut_does_not_matter(device, rows):
    c = case(rows, 300, 200, device, bias=True)
    threshold = c.quantile(0.5)
    for tiling in (
        Tiling(64, 16, 19, 1, 4),
        Tiling(32, 32, 1, 10, 4),
        Tiling(256, 64, 2, 3, 4),
        Tiling(64, 32, 7, 2, 8),
    ):
        c.check(c.cut(threshold, tiling), threshold)


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (33, 200), (4096, 4096), (11008, 4096), (128256, 8192)])
def test_tiling_covers_the_channels(rows, d_in, d_out):
    for processors in (1, 2, 132):
        for bits in (16, 32):
            cut = choose_tiling(rows, d_in, d_out, bits, 1, processors)
            assert cut.splits >= 1
            assert cut.splits * cut.steps * cut.block_in >= d_in
            assert (cut.splits - 1) * cut.steps * cut.block_in < d_in  # no program without work
            for size in (cut.block_in, cut.block_out):
                assert size & (size - 1) == 0


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_same_bits_every_time(device, rows):
    c = case(rows, 513, 96, device, dtype=torch.float16)
    threshold = c.quantile(0.5)
    first = c.run(threshold)
    for _ in range(3):
        assert torch.equal(c.run(threshold), first)


def test_strided_inputs(device):
    c = case(4, 66, 33, device)
    wide = torch.randn(4, 3, 66, device=device)
    wide[:, 1] = c.x
    expected = c.run(4.0)
    assert torch.equal(sparse_gemv(wide[:, 1], c.sparse(4.0)), expected)
    columns = c.x.t().contiguous().t()
    assert columns.stride() == (1, 4)
    assert torch.equal(sparse_gemv(columns, c.sparse(4.0)), expected)
    assert torch.equal(sparse_gemv(columns[1:2], c.sparse(4.0)), sparse_gemv(c.x[1:2], c.sparse(4.0)))
    assert sparse_gemv(c.x[:0], c.sparse(4.0)).shape == (0, 33)


def test_the_registered_op(device):
    c = case(3, 65, 33, device, bias=True)
    w = c.weight
    dense = torch.tensor([True, False, False], device=device)
    for x, bias, flags in ((c.x, c.bias, dense), (c.x[:1], None, None)):
        arguments = (x, w.columns, None, w.bits, w.group, w.width, c.norms, 4.0, bias, flags)
        torch.library.opcheck(
            torch.ops.was.sparse_gemv.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        assert torch.equal(torch.ops.was.sparse_gemv(*arguments), replace(c, x=x, bias=bias).run(4.0, flags))
        vectors = (1.0 + torch.rand(33, device=device), torch.rand(33, device=device))
        expected = replace(c, x=x, bias=None, vectors=vectors).run(4.0, flags)
        assert torch.equal(torch.ops.was.sparse_gemv(*arguments[:8], None, flags, *vectors), expected)


def test_refusals(device):
    c = case(2, 33, 7, device)

    def of(columns: torch.Tensor) -> Case:
        return replace(c, weight=ColumnWeight.as_stored(columns))

    with pytest.raises(ValueError, match=r"x: \[B, d_in\] needed, got \[2, 33, 1\]"):
        sparse_gemv(c.x[..., None], c.sparse(1.0))
    with pytest.raises(ValueError, match=r"weight: \[33, width\] with unit last stride needed, got \[7, 33\]"):
        of(c.weight.columns.t().contiguous()).run(1.0)
    with pytest.raises(ValueError, match=r"unit last stride needed, got \[33, 7\] with strides \(1, 33\)"):
        of(c.weight.columns.t().contiguous().t()).run(1.0)
    with pytest.raises(ValueError, match=r"weight: must be contiguous .* got strides \(14, 1\)"):
        of(torch.cat([c.weight.columns, c.weight.columns], dim=1)[:, :7]).run(1.0)
    with pytest.raises(ValueError, match=r"weight: must have x's dtype torch.float16, got torch.float32"):
        replace(c, x=c.x.half()).run(1.0)
    with pytest.raises(ValueError, match=r"norms: contiguous float32 \[33\] needed, got torch.float16"):
        replace(c, norms=c.norms.half()).run(1.0)
    with pytest.raises(ValueError, match=r"bias: contiguous \[7\] needed, got \[33\]"):
        replace(c, bias=c.norms).run(1.0)
    with pytest.raises(ValueError, match=r"dense: contiguous bool \[2\] needed, got torch.float32 \[33\]"):
        c.run(1.0, c.norms)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("d_in", "d_out"), [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_cuda_graph_at_model_size(cuda, rows, dtype, d_in, d_out):
    c = case(rows, d_in, d_out, cuda, dtype=dtype)
    threshold = c.quantile(0.6)
    sparse_gemv(c.x, c.sparse(threshold))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_gemv(c.x, c.sparse(threshold))
    c.x.copy_(torch.randn_like(c.x))
    graph.replay()
    c.check(y, threshold)
    first = y.clone()
    graph.replay()
    assert torch.equal(y, first)
