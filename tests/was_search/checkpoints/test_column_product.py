"""Products with weights by columns: right in every dtype, and never at the mercy of what a CPU lacks."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from was_search.checkpoints import column_product as module
from was_search.checkpoints.column_product import column_product

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_slow", [False, True])
def test_equals_the_product_in_float64(dtype, is_slow, monkeypatch):
    monkeypatch.setattr(module, "_is_slow", lambda dtype: is_slow)
    x, columns, bias = drawn(2, 3, 40, dtype=dtype), drawn(40, 24, dtype=dtype), drawn(24, dtype=dtype)
    for given in (None, bias):
        found = column_product(x, columns, given)
        expected = F.linear(x.double(), columns.double().t(), None if given is None else given.double())
        assert found.dtype == dtype and found.shape == (2, 3, 24)
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_a_gradient_passes(monkeypatch):
    for is_slow in (False, True):
        monkeypatch.setattr(module, "_is_slow", lambda dtype, answer=is_slow: answer)
        x = drawn(3, 40, dtype=torch.bfloat16).requires_grad_()
        columns = drawn(40, 24, dtype=torch.bfloat16)
        column_product(x, columns).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.float(), columns.float().sum(1).expand(3, 40), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_take_about_as_long_as_float32(dtype):
    """Number by number they would take some hundred times as long: the factor leaves room for a busy machine."""
    x, columns = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    wide = x.float(), columns.float()

    def seconds(*given: torch.Tensor) -> float:
        found = []
        for _ in range(5):
            started = time.perf_counter()
            column_product(*given)
            found.append(time.perf_counter() - started)
        return min(found)

    assert seconds(x, columns) < 20.0 * seconds(*wide)
