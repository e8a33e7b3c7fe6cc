"""Fused sparse projections against float64: the plain op on CPU, the CUDA kernel where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.gemv_group import HALF, INF, NAN, Group, close
from was_kernels.ops.column_weight import ColumnWeight
from was_kernels.ops.gather_cut import choose_cut
from was_kernels.ops.gather_gemv import gather_gemv


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize(("d_in", "widths"), [(64, [8]), (300, [24, 520]), (1037, [256, 128, 136]), (17, [1000])])
def test_projections_against_float64(op_device, dtype, rows, d_in, widths):
    group = Group(op_device, dtype, rows, d_in, widths, bias=rows % 2 == 0)
    thresholds = group.thresholds(0.6)
    close(group.run(thresholds), torch.cat(group.exact(thresholds), dim=1))


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.9])
def test_each_projection_has_its_own_threshold(op_device, sparsity):
    group = Group(op_device, torch.float16, 2, 512, [64, 64, 64])
    thresholds = [0.0, *group.thresholds(sparsity)[1:2], *group.thresholds(0.5)[2:]]
    close(group.run(thresholds), torch.cat(group.exact(thresholds), dim=1))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
@pytest.mark.parametrize("d_in", [296, 4096])
def test_gated_and_normed(op_device, dtype, rows, d_in):
    group = Group(op_device, dtype, rows, d_in, [344, 344])
    x = group.normed(1e-5)
    thresholds = group.thresholds(0.5, x)
    found = group.run(thresholds, gated=True, norm_weight=group.norm_weight, epsilon=1e-5)
    gate, up = group.exact(thresholds, x=x)
    # A channel whose score lies within a rounding of x of its threshold may fall on either side.
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0.03, atol=0.03)


def one_mask(group: Group, sparsity: float, x: Tensor | None = None) -> list[float]:
    """Give all projections of ``group`` the norms of their weights together; returns one threshold for each."""
    norms = torch.stack([own.square() for own in group.norms]).sum(0).sqrt()
    group.norms = [norms] * len(group.norms)
    return group.thresholds(sparsity, x)


def test_projections_of_one_mask_lie_side_by_side(op_device):
    """What a fused weight gives is what its parts give in one launch."""
    group = Group(op_device, torch.float16, 2, 1037, [256, 128, 136], bias=True)
    thresholds = one_mask(group, 0.6)
    parts = torch.cat(group.exact(thresholds), dim=1)
    close(group.run(thresholds), parts)
    group.hold([torch.cat(group.floats, dim=1)])
    group.norms = group.norms[:1]
    group.biases = [torch.cat([bias for bias in group.biases if bias is not None])]
    close(group.run(thresholds[:1]), parts)


@pytest.mark.parametrize("rows", [1, 4])
def test_residual_bias_and_dense_rows(op_device, rows):
    group = Group(op_device, torch.bfloat16, rows, 688, [256], bias=True)
    thresholds = group.thresholds(0.7)
    dense = torch.arange(rows, device=op_device) % 2 == 0
    found = group.run(thresholds, residual=group.residual, dense=dense)
    close(found, group.residual.double() + group.exact(thresholds, dense)[0])


def test_a_residual_beside_several_projections(op_device):
    group = Group(op_device, torch.float16, 1, 256, [64, 24])
    thresholds = group.thresholds(0.5)
    found = group.run(thresholds, residual=group.residual)
    close(found, group.residual.double() + torch.cat(group.exact(thresholds), dim=1))


@pytest.mark.gpu
def test_all_dropped_leaves_the_bias_and_reads_no_weight(cuda):
    group = Group("cuda", torch.float16, 1, 512, [256], bias=True)
    group.floats[0].fill_(NAN)
    assert torch.equal(group.run([INF]), group.biases[0][None])


@pytest.mark.gpu
def test_dropped_nan_and_infinite_weights_do_not_reach_the_sum(cuda):
    group = Group("cuda", torch.float16, 1, 512, [256])
    group.x[0, 5] = NAN  # a NaN score is dropped
    group.x[0, 6] = 0.0
    group.floats[0][6] = INF
    thresholds = group.thresholds(0.5)
    found = group.run(thresholds)
    assert torch.isfinite(found).all()
    group.floats[0][6] = 0.0
    group.x[0, 5] = 0.0
    close(found, group.exact(thresholds)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_all_zero_inputs_give_the_bias(op_device, rows, bias):
    group = Group(op_device, torch.bfloat16, rows, 296, [64, 24], bias=bias)
    group.x.zero_()
    expected = torch.cat(
        [b if b is not None else torch.zeros_like(w[0]) for b, w in zip(group.biases, group.floats, strict=True)]
    )
    for thresholds in ([0.5, 0.0], [INF, INF]):
        assert torch.equal(group.run(thresholds), expected.expand(rows, -1))


@pytest.mark.parametrize("rows", [1, 3])
def test_all_zero_inputs_through_the_norm(op_device, rows):
    """0 / sqrt(0 + epsilon) is 0, not NaN."""
    group = Group(op_device, torch.float16, rows, 296, [64, 64])
    group.x.zero_()
    found = group.run([0.1, 0.0], gated=True, norm_weight=group.norm_weight, epsilon=1e-5)
    assert torch.equal(found, torch.zeros_like(found))


def test_each_row_drops_its_own(op_device):
    """A row that drops everything beside one that keeps all, and a NaN row beside a finite one."""
    group = Group(op_device, torch.float16, 3, 512, [136], bias=True)
    group.x[0] = 0.0
    group.x[1] = 100.0
    group.x[2] = NAN
    found = group.run([1.0])
    assert torch.equal(found[0], group.biases[0])
    assert torch.equal(found[2], group.biases[0])  # NaN scores are dropped
    group.x[2] = 0.0
    close(found, group.exact([1.0])[0], scale=8.0)  # sums of 512 terms of 100


def test_a_threshold_of_zero_keeps_nan(op_device):
    group = Group(op_device, torch.float16, 2, 64, [8])
    group.x[0, 3] = NAN
    found = group.run([0.0])
    assert found[0].isnan().all()
    assert torch.isfinite(found[1]).all()


def test_a_nan_in_the_norms_drops_its_channel(op_device):
    group = Group(op_device, torch.float16, 1, 64, [8])
    group.norms[0][5] = NAN
    threshold = group.thresholds(0.3)
    found = group.run(threshold)
    assert torch.isfinite(found).all()
    group.x[0, 5] = 0.0
    assert torch.equal(group.run(threshold), found)


def test_kept_infinite_inputs_do(op_device):
    group = Group(op_device, torch.float16, 1, 64, [8])
    group.x[0, 3] = INF
    assert not torch.isfinite(group.run(group.thresholds(0.5))).any()


def test_ties_are_kept(op_device):
    group = Group(op_device, torch.float16, 1, 64, [8])
    group.x.fill_(0.5)
    group.norms[0].fill_(2.0)
    close(group.run([1.0]), group.exact([0.0])[0])
    assert not group.run([float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))]).any()


def test_strided_inputs_and_weights(op_device):
    group = Group(op_device, torch.float16, 3, 200, [64])
    thresholds = group.thresholds(0.5)
    expected = group.run(thresholds)
    group.x = torch.stack([group.x, group.x], dim=1)[:, 0]
    group.hold([torch.cat([weight, weight], dim=1)[:, :64] for weight in group.floats])
    assert torch.equal(group.run(thresholds), expected)


def test_bad_inputs_are_refused(op_device):
    group = Group(op_device, torch.float16, 1, 64, [8, 8])
    step = group.step([0.1, 0.1])

    def run(**changes: object) -> None:
        gather_gemv(replace(step, **changes), group.workspace)

    def with_weights(floats: list[Tensor]) -> None:
        run(maps=[replace(m, weight=ColumnWeight.as_stored(w)) for m, w in zip(step.maps, floats, strict=True)])

    with pytest.raises(ValueError, match="one to three"):
        run(maps=[])
    with pytest.raises(ValueError, match="gated"):
        run(gated=True, residual=group.residual[:, :8])
    with pytest.raises(ValueError, match="x's dtype"):
        run(x=group.x.bfloat16())
    with pytest.raises(ValueError, match="multiple of 8 needed, got 7"):
        with_weights([weight[:, :7] for weight in group.floats])
    with pytest.raises(ValueError, match="unit last stride"):
        with_weights([weight.t().contiguous().t() for weight in group.floats])
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        with_weights([torch.cat([w, w], 1)[:, 4:12] for w in group.floats])
    with pytest.raises(ValueError, match=r"norms: contiguous float32 \[64\] needed"):
        run(maps=[replace(step.maps[0], norms=group.norms[0].double())])
    odd = Group(op_device, torch.float16, 1, 60, [8])
    with pytest.raises(ValueError, match="multiple of 8 channels"):
        gather_gemv(odd.step([0.1], norm_weight=odd.norm_weight), odd.workspace)
    with pytest.raises(ValueError, match=r"x: \[1 to 16"):
        run(x=group.x.repeat(17, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_op_is_well_formed(op_device):
    group = Group(op_device, torch.float16, 2, 64, [16, 16])
    inputs = (group.x, group.floats, [], 16, 1, [16, 16], group.norms, [0.1, 0.0], group.biases, group.workspace)
    torch.library.opcheck(torch.ops.was.gather_gemv, inputs)
    torch.library.opcheck(torch.ops.was.gather_gemv, (*inputs, True))


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("d_in", [16, 300, 4096, 11008, 28672, 65536])
@pytest.mark.parametrize("widths", [(8,), (4096,), (4096, 1024, 1024), (14336, 14336), (28672,)])
def test_cuts_cover_everything_and_fit(rows, d_in, widths):
    cut = choose_cut(d_in, widths, rows, 132)
    assert cut.capacity * cut.shares >= d_in
    assert cut.capacity % 256 == 0
    columns = cut.lanes * 8
    for width, blocks in zip(widths, cut.blocks, strict=True):
        assert blocks * columns >= width > (blocks - 1) * columns
    assert cut.rows >= rows
    if cut.mma:  # the list, and inputs or in their place the sums
        deep = 8 * 64 // columns
        pitch = cut.capacity + deep * 32 + 8
        shared = pitch * 2 + max(cut.rows * pitch * 2, deep * cut.rows * columns * 4)
    else:
        firsts = 8 * cut.unroll * 32 // cut.lanes
        shared = (cut.capacity + firsts) * (2 + 4 * cut.rows) + (8 + cut.rows) * columns * 4
    assert shared + 512 <= 48 << 10  # the small arrays: counts, squares, scales


@pytest.mark.gpu
def test_more_blocks_than_fit_on_the_device(cuda):
    """Blocks that wait for others' sums start after them, so that they keep no room from them."""
    group = Group("cuda", torch.float16, 8, 2048, [28672, 28672], bits=8)
    thresholds = group.thresholds(0.5)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    cut = choose_cut(2048, (28672, 28672), 8, processors, 8)
    assert cut.shares > 1
    assert sum(cut.blocks) * cut.shares > cut.residents * processors
    gate, up = group.exact(thresholds)
    found = group.run(thresholds, gated=True)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0.03, atol=0.03)


@pytest.mark.gpu
def test_two_streams_at_once(cuda):
    """Launches of two models that share the device, each with blocks that wait for others of its own."""
    groups = [Group("cuda", torch.float16, 1, 4096, [4096, 4096, 4096]) for _ in range(2)]
    expected = [group.run(group.thresholds(0.5)) for group in groups]
    steps = [group.step(group.thresholds(0.5)) for group in groups]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(200):
        found = []
        for group, step, stream in zip(groups, steps, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(gather_gemv(step, group.workspace, early=True))
        for stream in streams:
            stream.synchronize()
        assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    with torch.cuda.device(0):
        found = [
            gather_gemv(group.step([0.5]), group.workspace)
            for group in (Group(device, torch.float16, 1, 64, [256]) for device in ("cuda:0", "cuda:1"))
        ]
    assert found[1].device == torch.device("cuda:1")
    assert torch.equal(found[0].cpu(), found[1].cpu())
