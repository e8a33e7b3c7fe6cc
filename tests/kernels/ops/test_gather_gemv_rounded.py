"""Fused sparse projections on rounded weights against float64: plain torch on CPU, the CUDA kernel on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.gemv_group import HALF, INF, NAN, Group, close
from was_kernels.ops.gather_cut import choose_cut
from was_kernels.ops.gather_gemv import gather_gemv


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("d_in", "widths"), [(64, [32]), (300, [96, 544]), (1037, [256, 128, 160]), (17, [1024])])
def test_projections_against_float64(op_device, dtype, rows, d_in, widths, bits):
    group = Group(op_device, dtype, rows, d_in, widths, bits, bias=rows % 2 == 0)
    thresholds = group.thresholds(0.6)
    close(group.run(thresholds), torch.cat(group.exact(thresholds), dim=1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("outputs", [32, 96, 128, 1024])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_group_has_its_own_scale(op_device, bits, outputs, rows):
    group = Group(op_device, torch.float16, rows, 300, [672], bits, group=outputs)
    close(group.run([0.0]), group.exact([0.0])[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("d_in", [296, 4096])
def test_gated_and_normed(op_device, dtype, rows, d_in, bits):
    group = Group(op_device, dtype, rows, d_in, [352, 352], bits)
    x = group.normed(1e-5)
    thresholds = group.thresholds(0.5, x)
    found = group.run(thresholds, gated=True, norm_weight=group.norm_weight, epsilon=1e-5)
    gate, up = group.exact(thresholds, x=x)
    # A channel whose score lies within a rounding of x of its threshold may fall on either side.
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_residual_bias_and_dense_rows(op_device, rows, bits):
    group = Group(op_device, torch.bfloat16, rows, 688, [256], bits, bias=True)
    thresholds = group.thresholds(0.7)
    dense = torch.arange(rows, device=op_device) % 2 == 0
    found = group.run(thresholds, residual=group.residual, dense=dense)
    close(found, group.residual.double() + group.exact(thresholds, dense)[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_dropped_channels_are_not_read(op_device, bits):
    group = Group(op_device, torch.float16, 1, 512, [256], bits, bias=True)
    group.x[0, 5] = NAN  # a NaN score is dropped
    thresholds = group.thresholds(0.5)
    group.weights[0].scales[5] = 1.0
    expected = group.run(thresholds)
    assert expected.isfinite().all()
    if op_device == "cuda":  # plain torch multiplies zeros by these
        dropped = ~(group.x[0].float().abs() * group.norms[0] >= thresholds[0])
        group.weights[0].scales[dropped] = NAN
        assert torch.equal(group.run(thresholds), expected)
    assert torch.equal(group.run([INF]), group.biases[0][None])


@pytest.mark.parametrize("bits", [8, 4])
def test_an_infinite_input_is_not_hidden(op_device, bits):
    group = Group(op_device, torch.float16, 2, 512, [256], bits)
    group.x[0, 6] = INF
    found = group.run([0.1])
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize(
    ("d_in", "widths"), [(4096, (4096,) * 3), (11008, (4096,)), (4096, (14336, 14336)), (64, (32,))]
)
def test_cuts_cover_the_shape(bits, rows, d_in, widths):
    cut = choose_cut(d_in, widths, rows, 132, bits)
    columns = cut.lanes * cut.per_lane
    assert columns in (128, 256) and cut.lanes in (4, 8, 16, 32)
    assert cut.per_lane * bits in (32, 64, 128)  # what one load takes
    assert cut.per_lane * cut.rows <= 64  # sums in registers
    assert all(blocks * columns >= width for blocks, width in zip(cut.blocks, widths, strict=True))
    assert cut.capacity * cut.shares >= d_in


def test_other_weights_are_refused():
    group = Group("cpu", torch.float16, 1, 64, [64], 4)
    odd = Group("cpu", torch.float16, 1, 64, [48], 4)
    with pytest.raises(ValueError, match="widths that are a multiple of 32 needed, got 48"):
        odd.run([0.1])
    other = Group("cpu", torch.float16, 1, 64, [64], 8)
    as_stored = Group("cpu", torch.float16, 1, 64, [64])
    for unlike in (other, as_stored):
        maps = [*group.step([0.1]).maps, *unlike.step([0.1]).maps]
        with pytest.raises(ValueError, match="one format for all needed"):
            gather_gemv(replace(group.step([0.1]), maps=maps), group.workspace)


def test_the_op_compiles_whole(op_device):
    group = Group(op_device, torch.float16, 1, 64, [64], 4)
    thresholds = group.thresholds(0.5)

    def call(x: Tensor) -> Tensor:
        return gather_gemv(replace(group.step(thresholds), x=x + 0), group.workspace)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(group.x), call(group.x))
