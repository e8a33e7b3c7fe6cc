from __future__ import annotations

import pytest
import torch

from tests.kernels.where import need_kernels
from was_kernels.ops.correction_passes import correct, correction_terms
from was_search.masks import corrections

need_kernels()

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(1, 1, 1), (2, 5, 33), (3, 4, 300), (1, 9, 1025), (5, 70, 130)]


def case(*shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs, their gradient, scale and constant."""
    generator = torch.Generator().manual_seed(0)
    y, gradient = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    scale, constant = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [y, gradient, scale + 1.0, constant]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_equals_the_plain_ones_in_float64(device, dtype, shape, prefix):
    y, gradient, scale, constant = case(*shape, dtype=dtype)
    prefix = min(prefix, shape[1])
    body = torch.arange(shape[1])[:, None] >= prefix
    found = correct(y.to(device), scale.to(device), constant.to(device), prefix).cpu()
    wanted = torch.where(body, y.double() * scale.double() + constant.double(), y.double())
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    passed, sums = (t.cpu() for t in correction_terms(*(t.to(device) for t in (y, gradient, scale)), prefix))
    wanted = torch.where(body, gradient.double() * scale.double(), gradient.double())
    assert passed.dtype == dtype
    torch.testing.assert_close(passed.double(), wanted, rtol=tolerance, atol=tolerance)
    inside = torch.where(body, gradient.double(), 0.0)
    wanted = torch.stack([(inside * y.double()).sum((0, 1)), inside.sum((0, 1))])
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 2])
def test_equals_the_plain_ones(device, prefix):
    y, gradient, scale, constant = case(4, 6, 200, dtype=torch.float32)
    found = correct(y.to(device), scale.to(device), constant.to(device), prefix)
    torch.testing.assert_close(found.cpu(), corrections.correct(y, scale, constant, prefix))
    for ours, plain in zip(
        correction_terms(y.to(device), gradient.to(device), scale.to(device), prefix),
        corrections.correction_terms(y, gradient, scale, prefix),
        strict=True,
    ):
        torch.testing.assert_close(ours.cpu(), plain)


def test_the_prefix_keeps_its_bits_and_counts_nowhere(device):
    y, gradient, scale, constant = (t.to(device) for t in case(3, 5, 40, dtype=torch.bfloat16))
    gradient[:, :2] = float("nan")
    y[:, :2] = float("inf")
    assert torch.equal(correct(y, scale, constant, 2)[:, :2], y[:, :2])
    passed, sums = correction_terms(y, gradient, scale, 2)
    assert bool(passed[:, :2].isnan().all()) and bool(sums.isfinite().all())


def test_what_is_not_contiguous(device):
    y, gradient, scale, constant = case(4, 3, 50, dtype=torch.float32)
    y, gradient = (t.transpose(0, 1).to(device) for t in (y, gradient))
    found = correct(y, scale.to(device), constant.to(device), 1)
    torch.testing.assert_close(found.cpu(), corrections.correct(y.cpu(), scale, constant, 1))
    found = correction_terms(y, gradient, scale.to(device), 1)
    wanted = corrections.correction_terms(y.cpu(), gradient.cpu(), scale, 1)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), plain)


def test_two_runs_give_the_same_bits(device):
    y, gradient, scale, _ = (t.to(device) for t in case(7, 90, 150, dtype=torch.bfloat16))
    first, second = (correction_terms(y, gradient, scale, 1)[1] for _ in range(2))
    assert torch.equal(first, second)
