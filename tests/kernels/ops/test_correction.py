"""Scales and constants of masked rows against float64: plain torch on CPU, the CUDA kernel where there is a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.gemv_group import HALF, INF, Group, close
from was_kernels.ops.correction import Correction
from was_kernels.ops.gather_gemv import gather_gemv


def every_second(rows: int, device: str) -> torch.Tensor:
    return torch.arange(rows, device=device) % 2 == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", HALF)
def test_projections_against_float64(op_device, dtype, rows, bits, bias):
    group = Group(op_device, dtype, rows, 300, [96, 544, 32], bits, bias=bias, corrected=True)
    some = group.thresholds(0.6)
    for thresholds in (some, [0.0, some[1], INF], [0.0] * 3):  # nothing dropped, and everything, is corrected too
        for dense in (None, every_second(rows, op_device)):
            close(group.run(thresholds, dense=dense), torch.cat(group.exact(thresholds, dense), dim=1))


@pytest.mark.parametrize("rows", [1, 3, 13])
def test_gated_and_normed(op_device, rows):
    group = Group(op_device, torch.float16, rows, 296, [344, 344], bias=True, corrected=True)
    x, dense = group.normed(1e-5), every_second(rows, op_device)
    thresholds = group.thresholds(0.5, x)
    found = group.run(thresholds, gated=True, norm_weight=group.norm_weight, epsilon=1e-5, dense=dense)
    gate, up = group.exact(thresholds, dense, x)
    # A channel whose score lies within a rounding of x of its threshold may fall on either side.
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_the_residual_is_not_corrected(op_device, rows):
    group = Group(op_device, torch.bfloat16, rows, 688, [256], bias=True, corrected=True)
    thresholds, dense = group.thresholds(0.7), every_second(rows, op_device)
    found = group.run(thresholds, residual=group.residual, dense=dense)
    close(found, group.residual.double() + group.exact(thresholds, dense)[0])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_scale_of_one_and_a_constant_of_zero_change_no_bit(op_device, rows):
    group = Group(op_device, torch.float16, rows, 300, [96, 544], bias=True)
    thresholds = group.thresholds(0.5)
    expected = group.run(thresholds)
    group.vectors = [(torch.ones(n, device=op_device), torch.zeros(n, device=op_device)) for n in (96, 544)]
    assert torch.equal(group.run(thresholds), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_op_is_well_formed(op_device):
    group = Group(op_device, torch.float16, 2, 64, [16, 16], corrected=True)
    inputs = (group.x, group.floats, [], 16, 1, [16, 16], group.norms, [0.1, 0.0], group.biases, group.workspace)
    vectors = [vector for pair in group.vectors for vector in pair]
    torch.library.opcheck(torch.ops.was.gather_gemv, inputs, {"corrections": vectors})


def test_bad_corrections_are_refused(op_device):
    group = Group(op_device, torch.float16, 1, 64, [8, 8], corrected=True)
    step = group.step([0.1, 0.1])
    first, second = step.maps
    with pytest.raises(ValueError, match="all with a correction needed, or none"):
        gather_gemv(replace(step, maps=[first, replace(second, correction=None)]), group.workspace)
    scale, constant = group.vectors[0]
    for wrong, message in (
        (Correction(scale.double(), constant), r"scale: contiguous float32 \[8\] needed, got torch.float64 \[8\]"),
        (Correction(scale, constant[:7]), r"constant: contiguous float32 \[8\] needed, got torch.float32 \[7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_gemv(replace(step, maps=[replace(first, correction=wrong), second]), group.workspace)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("bias", [False, True])
def test_applied_to_a_dense_product(dtype, bias):
    make = torch.Generator().manual_seed(0)
    product, own = (torch.randn(shape, generator=make).to(dtype) for shape in ((2, 3, 40), (40,)))
    scale, constant = 1.0 + torch.randn(40, generator=make) / 8, torch.randn(40, generator=make) / 4
    held = own if bias else None
    plain = product.double() + (own.double() if bias else 0.0)
    corrected = scale.double() * plain + constant.double()
    correction = Correction.of(scale, constant, held)
    dense = torch.tensor([True, False, False, True, True, False])
    mixed = torch.where(dense.view(2, 3, 1), plain, corrected)
    step = torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps  # the vectors are float32
    for flags, expected in ((dense, mixed), (None, corrected)):
        found = correction.applied(product.clone(), held, flags)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=step, atol=step)
    apart = product.clone().requires_grad_()  # as where weights are parameters: no call may write over it
    correction.applied(apart, held, None).sum().backward()
    assert torch.allclose(apart.grad, scale.to(dtype).expand_as(apart))


def test_torch_compile_gives_the_same():
    product = torch.randn(3, 40).bfloat16()
    correction = Correction.of(1.0 + torch.randn(40) / 8, torch.randn(40), None)
    compiled = torch.compile(correction.applied, backend="eager", fullgraph=True)
    for flags in (None, torch.tensor([True, False, False])):
        expected = correction.applied(product.clone(), None, flags)
        assert torch.equal(compiled(product.clone(), None, flags), expected)
