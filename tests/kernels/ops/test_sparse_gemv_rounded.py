"""The sparse GEMV on rounded weights against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.gemv_case import Tiling, case, combinations
from tests.kernels.gemv_group import INF, NAN
from tests.kernels.where import need_kernels
from was_kernels.ops.column_weight import ColumnWeight
from was_kernels.ops.sparse_gemv import choose_tiling, sparse_gemv

need_kernels()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dtype", "d_in", "d_out", "rows"), combinations(1, 3, 17))
def test_against_float64(device, dtype, d_in, d_out, rows, bits):
    c = case(rows, d_in, d_out, device, bits=bits, dtype=dtype, bias=rows % 2 == 1)
    for sparsity in (0.0, 0.6) if rows < 16 else (0.9,):
        threshold = c.quantile(sparsity) if sparsity else 0.0
        c.check(c.run(threshold), threshold)
        c.check(c.reference(threshold), threshold)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 96, 128])
@pytest.mark.parametrize("rows", [1, 2])
def test_every_group_has_its_own_scale(device, bits, group, rows):
    c = case(rows, 70, 300, device, bits=bits, group=group)
    c.weight.scales.mul_(torch.rand_like(c.weight.scales, dtype=torch.float32).half() + 0.5)
    threshold = c.quantile(0.5)
    c.check(c.run(threshold), threshold)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_ties_are_kept(device, rows, bits):
    c = case(rows, 65, 33, device, bits=bits)
    c.x.copy_(torch.where(torch.rand_like(c.x) < 0.5, 0.5, 0.25))
    c.norms.fill_(0.5)
    assert torch.equal(c.run(0.125), c.run(0.0))
    c.check(c.run(0.25), 0.25)
    assert c.run(0.25 + 2**-24).count_nonzero() == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_everything_dropped_leaves_the_bias(device, rows, bits):
    c = case(rows, 127, 65, device, bits=bits, dtype=torch.float16, bias=True)
    found = c.run(1e9)
    assert c.bias is not None and torch.equal(found, c.bias.expand(rows, -1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_dropped_weights_and_scales_are_not_read(device, rows, bits):
    # NaN scales in the channels that every row drops: a kernel that read them would return NaN.
    c = case(rows, 300, 65, device, bits=bits)
    threshold = c.quantile(0.8)
    dropped = ((c.x.abs().float() * c.norms) < threshold).all(dim=0)
    assert 0 < int(dropped.sum()) < 300
    expected = c.run(threshold)
    c.weight.scales[dropped] = NAN
    assert torch.equal(c.run(threshold), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_nan_and_inf(device, rows, bits):
    c = case(rows, 65, 33, device, bits=bits)
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
    c = case(rows, 127, 65, device, bits=bits, bias=True)
    threshold = c.quantile(0.7)
    for flags in (torch.ones(rows), torch.arange(rows) % 2 == 0, torch.zeros(rows)):
        dense = flags.bool().to(device)
        c.check(c.run(threshold, dense), threshold, dense)


@pytest.mark.parametrize("bits", [8, 4])
def test_strided_rows_and_an_empty_batch(device, bits):
    c = case(4, 128, 64, device, bits=bits)
    expected = c.run(0.5)
    wide = torch.zeros(4, 256, device=device)
    wide[:, ::2] = c.x
    assert torch.equal(sparse_gemv(wide[:, ::2], c.sparse(0.5)), expected)
    assert sparse_gemv(c.x[:0], c.sparse(0.5)).shape == (0, 64)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_any_tiling_gives_the_same_sum(device, rows, bits):
    c = case(rows, 300, 200, device, bits=bits)
    for cut in (Tiling(32, 32, 1, 10, 4), Tiling(64, 32, 10, 1, 4), Tiling(32, 64, 2, 3, 4)):
        c.check(c.cut(0.5, cut), 0.5)


def test_tiles_lie_within_groups():
    for rows in (1, 4):
        for group in (32, 96, 128, 4096):
            assert group % choose_tiling(rows, 4096, 11008, 4, group, 132).block_out == 0


def test_other_inputs_are_refused(device):
    c = case(2, 64, 64, device, bits=4)
    w = c.weight
    assert w.scales is not None
    for weight, message in [
        (ColumnWeight(w.columns[:, :-1], w.scales, 4, 64, 64), r"weight: contiguous uint8 \[64, 32\] needed"),
        (ColumnWeight(w.columns, w.scales.float(), 4, 64, 64), r"scales: contiguous float16 \[64, 1, 2\] needed"),
        (ColumnWeight(w.columns, w.scales, 4, 48, 64), "a multiple of 32 needed, got 4 and 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(c, weight=weight).run(0.5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("d_out", "group"), [(128, 32), (65, 32), (7, 64), (200, 96)])
def test_a_weight_written_out_is_the_one_that_was_rounded(device, bits, d_out, group):
    """To the bit what the search's own rounding means, which the ops do not import."""
    c = case(1, 33, d_out, device, bits=bits, group=group)
    assert torch.equal(c.weight.written_out().double(), c.dense.t())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_registered_op(device, bits):
    c = case(3, 65, 33, device, bits=bits, bias=True)
    w = c.weight
    arguments = (c.x, w.columns, w.scales, bits, w.group, w.width, c.norms, 4.0, c.bias, None)
    torch.library.opcheck(torch.ops.was.sparse_gemv.default, arguments, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(torch.ops.was.sparse_gemv(*arguments), c.run(4.0))
