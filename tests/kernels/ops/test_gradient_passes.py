from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.where import INTERPRETER, need_kernels
from was_kernels.ops.gradient_passes import count_scores, price_terms, slope_terms
from was_search.masks import gradient_terms
from was_search.masks.histogram import bin_counts
from was_search.masks.score import scores

need_kernels()

INF, NAN = float("inf"), float("nan")
INFINITE_BIN = 0x7F80
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(1, 2, 1), (2, 5, 33), (3, 4, 300), (1, 9, 1025)]


def case(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, gradient and norms."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return x, gradient, torch.rand(shape[-1], generator=generator) + 0.1


@pytest.mark.parametrize("shape", [(1,), (4096,), (5000,), (3, 7, 65)])
def test_counts_equal_the_plain_ones(device, shape):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).abs()
    found = count_scores(values.to(device))
    assert found.dtype == torch.int64
    torch.testing.assert_close(found.cpu(), bin_counts(values), rtol=0, atol=0)


def test_counts_of_special_scores(device):
    values = torch.tensor([0.0, -0.0, INF, NAN, -NAN, 1e-45, 3.4e38, 1.0, 1.0])
    torch.testing.assert_close(count_scores(values.to(device)).cpu(), bin_counts(values), rtol=0, atol=0)
    assert count_scores(values[:0].to(device)).sum() == 0


def test_counts_of_a_slice(device):
    values = torch.rand(4, 6, 10)
    found = count_scores(values.to(device)[:, 1:, ::2])
    torch.testing.assert_close(found.cpu(), bin_counts(values[:, 1:, ::2]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix", [0, 1])
def test_slopes_equal_the_plain_ones(device, dtype, shape, prefix):
    x, gradient, norms = case(*shape, dtype=dtype)
    limits = torch.tensor([0.4, 0.3, 0.6])
    for width in (0.0, 0.5):
        found = slope_terms(*(t.to(device) for t in (x, gradient, norms, limits)), width, prefix)
        passed, change, counts = (t.cpu() for t in found)
        wanted = gradient_terms.slope_terms(x, gradient, norms, limits, width, prefix)
        # The factor is formed in float32 by the same operations: it may differ in its last digit.
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(passed, wanted[0], rtol=tolerance, atol=1e-6)
        assert passed.dtype == dtype
        assert float(change) == pytest.approx(float(wanted[1]), rel=1e-5, abs=1e-5)
        torch.testing.assert_close(counts, wanted[2], rtol=0, atol=0)


def test_slopes_leave_the_prefix_alone(device):
    x, gradient, norms = case(2, 6, 40, dtype=torch.float32)
    passed, change, counts = slope_terms(
        x.to(device), gradient.to(device), norms.to(device), torch.tensor([9.0, 0.0, 9.0], device=device), 0.5, 6
    )
    torch.testing.assert_close(passed.cpu(), gradient, rtol=0, atol=0)
    assert float(change) == 0.0
    assert int(counts.sum()) == 0


def test_slopes_at_ties_and_at_a_threshold_of_zero(device):
    """Scores at the limits: the lower one belongs to the window, the upper one does not; a tie is kept."""
    x = torch.tensor([[[0.5, 1.0, 2.0, 0.0]]])
    gradient = torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]])
    norms = torch.ones(4)
    for limits in (torch.tensor([1.0, 0.5, 2.0]), torch.zeros(3)):
        found = slope_terms(*(t.to(device) for t in (x, gradient, norms, limits)), 0.0, 0)
        wanted = gradient_terms.slope_terms(x, gradient, norms, limits, 0.0, 0)
        torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=0, atol=0)
        assert float(found[1]) == float(wanted[1])
    first = slope_terms(*(t.to(device) for t in (x, gradient, norms, torch.tensor([1.0, 0.5, 2.0]))), 0.0, 0)
    assert first[0].flatten().tolist() == [0.0, 10.0, 100.0, 0.0]
    assert float(first[1]) == -(0.5 + 10.0)


def test_slopes_of_inputs_that_are_not_contiguous(device):
    x, gradient, norms = case(4, 3, 50, dtype=torch.float32)
    limits = torch.tensor([0.4, 0.3, 0.6])
    x, gradient = x.transpose(0, 1), gradient.transpose(0, 1)
    found = slope_terms(*(t.to(device) for t in (x, gradient, norms, limits)), 0.5, 1)
    wanted = gradient_terms.slope_terms(x, gradient, norms, limits, 0.5, 1)
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2].cpu(), wanted[2], rtol=0, atol=0)


def test_slopes_of_special_values(device):
    """An infinite score lies in no band and no window; NaN is counted as the NaN that it is, and dropped."""
    x = torch.tensor([[[INF, -INF, NAN, 0.0, -0.0, 1.0], [1.0, 0.4, INF, NAN, 0.0, 0.35]]])
    gradient = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [NAN, 1.0, INF, 1.0, 1.0, -2.0]]])
    norms, limits = torch.ones(6), torch.tensor([0.4, 0.3, 0.6])
    for width in (0.0, 0.5):
        found = slope_terms(*(t.to(device) for t in (x, gradient, norms, limits)), width, 0)
        passed, change, counts = gradient_terms.slope_terms(x, gradient, norms, limits, width, 0)
        torch.testing.assert_close(found[0].cpu(), passed, rtol=1e-6, atol=0.0, equal_nan=True)
        torch.testing.assert_close(found[1].cpu(), change, equal_nan=True)
        # A NaN's bits, and so its bin, are the device's own.
        assert torch.equal(found[2][: INFINITE_BIN + 1].cpu(), counts[: INFINITE_BIN + 1])
        assert found[2][INFINITE_BIN + 1 :].sum() == counts[INFINITE_BIN + 1 :].sum()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_all_zero_and_all_kept_inputs(device, value):
    x, gradient, norms = torch.full((2, 3, 33), value), torch.ones(2, 3, 33), torch.ones(33)
    limits, bounds = torch.tensor([0.4, 0.3, 0.6]), torch.tensor([0.0, 0.5, 1.0])
    passed, change, counts = slope_terms(*(t.to(device) for t in (x, gradient, norms, limits)), 0.5, 1)
    assert torch.equal(passed[:, 1:].cpu(), torch.full((2, 2, 33), float(value > 0)))
    assert float(change) == 0.0
    assert int(counts.sum()) == 2 * 2 * 33
    assert price_terms(*(t.to(device) for t in (x, gradient, norms, bounds)), 1).tolist() == [0.0] * 3


def test_prices_of_inputs_that_are_not_contiguous(device):
    x, gradient, norms = case(4, 3, 50, dtype=torch.float32)
    bounds = torch.linspace(0.0, 2.0, 5)
    x, gradient = x.transpose(0, 1), gradient.transpose(0, 1)
    found = price_terms(*(t.to(device) for t in (x, gradient, norms, bounds)), 1).cpu()
    wanted = gradient_terms.price_terms(x.contiguous(), gradient.contiguous(), norms, bounds, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_prices_of_tokens_that_are_not_finite_are_not_finite(device):
    """They end in InfeasibleError in the greedy, as the plain version's do, and never in a number."""
    x, gradient, norms = case(1, 3, 40, dtype=torch.float32)
    gradient[0, 1, 7], x[0, 1, 7] = INF, 0.01
    bounds = torch.tensor([0.0, 0.5, 2.0])
    found = price_terms(*(t.to(device) for t in (x, gradient, norms, bounds)), 0).cpu()
    plain = gradient_terms.price_terms(x, gradient, norms, bounds, 0)
    assert not torch.isfinite(found[1:]).any()
    assert not torch.isfinite(plain[1:]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [1, 5, 39])
def test_prices_equal_float64(device, dtype, shape, levels):
    x, gradient, norms = case(*shape, dtype=dtype)
    bounds = torch.linspace(0.0, 2.0, levels)
    found = price_terms(*(t.to(device) for t in (x, gradient, norms, bounds)), 1).cpu()
    body, slope_at = (t[:, 1:].flatten(0, 1).double().numpy() for t in (x, gradient))
    values = scores(x[:, 1:].flatten(0, 1), norms).numpy()
    wanted = [0.5 * np.square((body * slope_at * (values < float(b))).sum(axis=1)).sum() for b in bounds]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    plain = gradient_terms.price_terms(x, gradient, norms, bounds, 1)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_a_level_drops_what_lies_under_its_bound(device):
    x, gradient = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
    bounds = torch.tensor([0.0, 1.0, 2.0, 2.5, 4.0])
    found = price_terms(*(t.to(device) for t in (x, gradient, torch.ones(3), bounds)), 0)
    assert found.tolist() == [0.0, 0.0, 0.5, 4.5, 18.0]


def test_two_runs_give_the_same_bits(device):
    x, gradient, norms = (t.to(device) for t in case(4, 8 if INTERPRETER else 64, 300, dtype=torch.float16))
    limits, bounds = torch.tensor([0.4, 0.3, 0.6], device=device), torch.linspace(0.0, 2.0, 39, device=device)
    first, second = (
        (*slope_terms(x, gradient, norms, limits, 0.5, 1), price_terms(x, gradient, norms, bounds, 1)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
