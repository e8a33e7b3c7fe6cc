from __future__ import annotations

import pytest
import torch

from was_search.masks.score import column_norms, mask_input, masked, or_zero, scores
from was_search.shape import SCORE_KINDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 1024, 2051])  # around and across the chunk of 1024 rows
@pytest.mark.parametrize(("kind", "order"), [("l1", 1), ("l2", 2)])
def test_column_norms_against_float64(kind, order, rows, dtype):
    weight = torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = torch.linalg.vector_norm(weight.double(), ord=order, dim=0)
    found = column_norms(weight, kind)
    assert found.dtype == torch.float32
    # float32 sums of 2,051 positive terms: a relative error of a few 2^-24 times log2(terms).
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)


def test_norms_of_kind_none_are_ones():
    assert torch.equal(column_norms(torch.randn(3, 5), "none"), torch.ones(5))


def test_norms_of_half_precision_weights_do_not_overflow():
    weight = torch.full((3000, 2), 100.0, dtype=torch.float16)  # the sum of squares is 3e7: inf in float16
    torch.testing.assert_close(column_norms(weight, "l2"), torch.full((2,), 100.0 * 3000**0.5))
    torch.testing.assert_close(column_norms(weight, "l1"), torch.full((2,), 3e5))


def test_norms_need_no_gradient_and_leave_the_weight_alone():
    weight = torch.randn(4, 3, requires_grad=True)
    assert not column_norms(weight, "l2").requires_grad
    assert weight.grad is None


def test_scores_element_by_element():
    x = torch.tensor([[-2.0, 0.5, 0.0], [1.0, -1.0, 3.0]])
    norms = torch.tensor([1.0, 4.0, 9.0])
    expected = [[abs(float(v)) * float(n) for v, n in zip(row, norms, strict=True)] for row in x]
    assert scores(x, norms).tolist() == expected
    assert scores(x.bfloat16(), norms).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_element_by_element(dtype):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    norms = torch.rand(7, generator=torch.Generator().manual_seed(1))
    found = masked(x, norms, 0.4)
    assert found.dtype == dtype
    for i, (value, kept) in enumerate(zip(x.flatten(), found.flatten(), strict=True)):
        score = value.abs().float() * norms[i % 7]
        assert float(kept) == (float(value) if score >= 0.4 else 0.0)


def test_a_score_equal_to_the_threshold_is_kept():
    x = torch.tensor([0.25, 0.5, 1.0])
    assert masked(x, torch.ones(3), 0.5).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_no_threshold_drops_nothing(threshold):
    x = torch.tensor([0.0, -1.0, 2.0])
    assert masked(x, torch.zeros(3), threshold) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_has_its_bits_and_the_rest_is_zero(dtype):
    """Of every kind of number, in a tensor whose elements do not lie side by side, as torch's own has it."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -2.5])
    x = special.to(dtype).repeat(4, 3, 2)[:, 1:].transpose(0, 2)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    before = x.clone()
    expected = torch.where(keep, x, torch.zeros((), dtype=dtype))
    assert torch.equal(or_zero(keep, x).view(integer), expected.view(integer))
    assert torch.equal(x.contiguous().view(integer), before.contiguous().view(integer))


def test_gradients_go_through_what_is_kept():
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    masked(x, torch.ones(3), 1.5).square().sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, -4.0, 6.0]


@pytest.mark.parametrize("threshold", [1e-50, 0.4])
def test_zeros_are_never_counted_as_kept(threshold):
    """Not under a threshold either that float32 takes for zero, where all scores reach it."""
    x = torch.tensor([[[9.0, 9.0], [0.0, 1.0], [-2.0, 0.0]]])
    y, kept = mask_input(x, torch.ones(2), threshold, 1)
    assert torch.equal(y, x)
    assert (int(kept), kept.dtype, kept.dim()) == (2, torch.int64, 0)


def test_kinds():
    assert SCORE_KINDS == ("l1", "l2", "none")
