"""Fused sparse projections against float64: the plain op on CPU, the CUDA kernel where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.gather_gemv import choose_cut, counters, gather_gemv

HALF = [torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


class Group:
    """Random inputs of one launch."""

    def __init__(
        self, device: str, dtype: torch.dtype, rows: int, d_in: int, widths: list[int], *, bias: bool = False
    ) -> None:
        made = torch.Generator().manual_seed(rows * 7919 + d_in * 31 + sum(widths))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made).to(device, dtype)

        self.x = random(rows, d_in)
        self.weights = [random(d_in, width) / d_in**0.5 for width in widths]
        self.norms = [weight.float().norm(dim=1) for weight in self.weights]
        self.biases: list[Tensor | None] = [random(width) if bias else None for width in widths]
        self.norm_weight = 1.0 + random(d_in) / 8
        self.residual = random(rows, sum(widths))
        self.arrived = counters(torch.device(device))

    def thresholds(self, sparsity: float, x: Tensor | None = None) -> list[float]:
        x = self.x if x is None else x
        return [float((x.float().abs() * norms).flatten().nanquantile(sparsity)) for norms in self.norms]

    def exact(self, thresholds: list[float], dense: Tensor | None = None, x: Tensor | None = None) -> list[Tensor]:
        """Outputs of the projections in float64, the masks made in float32 as the op defines them."""
        x = self.x if x is None else x
        found = []
        for weight, norms, threshold, bias in zip(self.weights, self.norms, thresholds, self.biases, strict=True):
            keep = x.float().abs() * norms >= threshold
            keep = torch.ones_like(keep) if threshold <= 0.0 else keep
            keep = keep if dense is None else keep | dense[:, None]
            y = torch.where(keep, x, 0.0).double() @ weight.double()
            found.append(y if bias is None else y + bias.double())
        return found

    def run(self, thresholds: list[float], **options: Any) -> Tensor:
        inputs = (self.weights, self.norms, thresholds, self.biases, self.arrived)
        found = gather_gemv(self.x, *inputs, **options)
        again = gather_gemv(self.x, *inputs, **options, early=True)
        assert torch.equal(found.view(torch.int16), again.view(torch.int16))  # to the bit, NaN included
        assert not self.arrived.any()
        return found


def close(found: Tensor, exact: Tensor, scale: float = 4.0) -> None:
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=scale * unit, atol=scale * unit)


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
    wide = group.x.float()
    x = group.norm_weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
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


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(("d_in", "width"), [(64, 8), (296, 344), (1040, 128), (4096, 136)])
def test_one_list_for_gate_and_up(op_device, dtype, rows, d_in, width):
    group = Group(op_device, dtype, rows, d_in, [width, width], bias=rows % 2 == 0)
    wide = group.x.float()
    x = group.norm_weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    options = {"gated": True, "norm_weight": group.norm_weight, "epsilon": 1e-5}
    thresholds = one_mask(group, 0.5, x)
    found = group.run(thresholds, **options, one_list=True)
    gate, up = group.exact(thresholds, x=x)
    # A channel whose score lies within a rounding of x of its threshold may fall on either side.
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0.03, atol=0.03)
    # With two lists: the same masks and products, shares of channels cut as for one list or not.
    unit = torch.finfo(dtype).eps
    two_lists = group.run(thresholds, **options)
    torch.testing.assert_close(found, two_lists, rtol=8 * unit, atol=8 * unit)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_list_with_dense_rows_strided_weights_and_no_norm(op_device, rows):
    group = Group(op_device, torch.bfloat16, rows, 688, [264, 264], bias=True)
    thresholds = one_mask(group, 0.7)
    dense = torch.arange(rows, device=op_device) % 2 == 0
    expected = group.run(thresholds, gated=True, one_list=True, dense=dense)
    gate, up = group.exact(thresholds, dense)
    torch.testing.assert_close(expected.double(), F.silu(gate) * up, rtol=0.03, atol=0.03)
    together = torch.cat(group.weights, dim=1)
    group.weights = [together[:, :264], together[:, 264:]]
    assert torch.equal(group.run(thresholds, gated=True, one_list=True, dense=dense), expected)
    group.weights = [weight.clone().fill_(NAN) for weight in group.weights]
    assert not group.run([INF, INF], gated=True, one_list=True).isnan().any() or op_device == "cpu"


def test_projections_of_one_mask_lie_side_by_side(op_device):
    """What a fused weight gives is what its parts give in one launch."""
    group = Group(op_device, torch.float16, 2, 1037, [256, 128, 136], bias=True)
    thresholds = one_mask(group, 0.6)
    parts = torch.cat(group.exact(thresholds), dim=1)
    close(group.run(thresholds), parts)
    group.weights, group.norms = [torch.cat(group.weights, dim=1)], group.norms[:1]
    group.biases = [torch.cat([bias for bias in group.biases if bias is not None])]
    close(group.run(thresholds[:1]), parts)


@pytest.mark.parametrize("rows", [1, 4])
def test_residual_bias_and_dense_rows(op_device, rows):
    group = Group(op_device, torch.bfloat16, rows, 688, [256], bias=True)
    thresholds = group.thresholds(0.7)
    dense = torch.arange(rows, device=op_device) % 2 == 0
    found = group.run(thresholds, residual=group.residual, dense=dense)
    close(found, group.residual.double() + group.exact(thresholds, dense)[0])


@pytest.mark.gpu
def test_all_dropped_leaves_the_bias_and_reads_no_weight(cuda):
    group = Group("cuda", torch.float16, 1, 512, [256], bias=True)
    group.weights[0].fill_(NAN)
    assert torch.equal(group.run([INF]), group.biases[0][None])


@pytest.mark.gpu
def test_dropped_nan_and_infinite_weights_do_not_reach_the_sum(cuda):
    group = Group("cuda", torch.float16, 1, 512, [256])
    group.x[0, 5] = NAN  # a NaN score is dropped
    group.x[0, 6] = 0.0
    group.weights[0][6] = INF
    thresholds = group.thresholds(0.5)
    found = group.run(thresholds)
    assert torch.isfinite(found).all()
    group.weights[0][6] = 0.0
    group.x[0, 5] = 0.0
    close(found, group.exact(thresholds)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_all_zero_inputs_give_the_bias(op_device, rows, bias):
    group = Group(op_device, torch.bfloat16, rows, 296, [64, 24], bias=bias)
    group.x.zero_()
    expected = torch.cat(
        [b if b is not None else torch.zeros_like(w[0]) for b, w in zip(group.biases, group.weights, strict=True)]
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
    group.weights = [torch.cat([weight, weight], dim=1)[:, :64] for weight in group.weights]
    assert torch.equal(group.run(thresholds), expected)


def test_bad_inputs_are_refused(op_device):
    group = Group(op_device, torch.float16, 1, 64, [8, 8])
    given = (group.weights, group.norms, [0.1, 0.1], group.biases, group.arrived)
    with pytest.raises(ValueError, match="one to three"):
        gather_gemv(group.x, [], [], [], [], group.arrived)
    with pytest.raises(ValueError, match="gated"):
        gather_gemv(group.x, *given, gated=True, residual=group.residual[:, :8])
    with pytest.raises(ValueError, match="x's dtype"):
        gather_gemv(group.x.bfloat16(), *given)
    with pytest.raises(ValueError, match="multiple of 8"):
        gather_gemv(group.x, [weight[:, :7] for weight in group.weights], *given[1:])
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        gather_gemv(group.x, [torch.cat([w, w], 1)[:, 4:12] for w in group.weights], *given[1:])
    for thresholds, norms in (([0.1, 0.2], group.norms[:1] * 2), ([0.1, 0.1], group.norms)):
        with pytest.raises(ValueError, match="one_list: takes two gated weights with one threshold and one tensor"):
            gather_gemv(
                group.x, group.weights, norms, thresholds, group.biases, group.arrived, gated=True, one_list=True
            )
    odd = Group(op_device, torch.float16, 1, 60, [8])
    with pytest.raises(ValueError, match="multiple of 8 channels"):
        gather_gemv(odd.x, odd.weights, odd.norms, [0.1], odd.biases, odd.arrived, norm_weight=odd.norm_weight)
    with pytest.raises(ValueError, match=r"x: \[1 to 16"):
        gather_gemv(group.x.repeat(17, 1), *given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_op_is_well_formed(op_device):
    group = Group(op_device, torch.float16, 2, 64, [16, 16])
    inputs = (group.x, group.weights, group.norms, [0.1, 0.0], group.biases, group.arrived)
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
        shared = cut.capacity * (2 + 4 * cut.rows) + 8 * columns * 4
    assert shared + 1024 <= 48 << 10


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("d_in", [16, 300, 4096, 11008])
@pytest.mark.parametrize("width", [8, 344, 11008, 14336])
def test_cuts_for_one_list_cover_gate_and_up(rows, d_in, width):
    cut = choose_cut(d_in, (width, width), rows, 132, one_list=True)
    outputs = cut.lanes * 4  # a block's, of gate and of up
    assert len(cut.blocks) == 1
    assert cut.blocks[0] * outputs >= width > (cut.blocks[0] - 1) * outputs
    assert cut.capacity * cut.shares >= d_in


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    with torch.cuda.device(0):
        found = [
            gather_gemv(group.x, group.weights, group.norms, [0.5], group.biases, group.arrived)
            for group in (Group(device, torch.float16, 1, 64, [256]) for device in ("cuda:0", "cuda:1"))
        ]
    assert found[1].device == torch.device("cuda:1")
    assert torch.equal(found[0].cpu(), found[1].cpu())
