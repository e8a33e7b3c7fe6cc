"""Products on a CPU: both ways are right, the choice is made once, and SparseLinear takes them where they fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.kernels.products import WAYS, take
from was_kernels.runtime import cpu_product
from was_kernels.runtime.compiled_code import compiles_here
from was_kernels.runtime.cpu_product import CpuProduct
from was_kernels.runtime.held_weight import StoredWeight
from was_kernels.runtime.positions import DensePrefix
from was_kernels.runtime.sparse_linear import SparseLinear
from was_search.masks.score import column_norms, masked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[*WAYS, "measured"])
def choice(request, monkeypatch):
    """Which product is taken; "measured" leaves it to the clock."""
    if request.param != "measured":
        take(request.param, monkeypatch)
    return request.param


def linear_of(dtype: torch.dtype, *, bias: bool = True, sizes: tuple[int, int] = (65, 33)) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (16, 1), (17, 1), (1, 6), (3, 4), (4,), ()])
@pytest.mark.parametrize("threshold", [0.3, 0.0])
def test_equals_the_masked_linear(choice, dtype, shape, threshold):
    linear = linear_of(dtype, bias=len(shape) != 1)
    norms = column_norms(linear.weight, "l2")
    x = torch.randn(*shape, 65).to(dtype)
    with torch.no_grad():
        kept = masked(x, norms, threshold) if threshold else x
        expected = nn.functional.linear(kept.double(), linear.weight.double())
        expected = expected if linear.bias is None else expected + linear.bias.double()
        sparse = SparseLinear(linear, norms, threshold, prefix=None, triton=False, cpu=True, dense_above=None)
        found = sparse(x)
    assert sparse.bags is not None
    assert found.shape == expected.shape and found.dtype == dtype
    # Two sums of up to 65 products of order 1, in different orders and each rounded once or twice to the dtype.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=4 * eps)


def test_flagged_rows_are_dense(choice):
    linear = linear_of(torch.float32)
    norms = column_norms(linear.weight, "l2")
    prefix = DensePrefix(2)
    sparse = SparseLinear(linear, norms, 0.4, prefix=prefix, triton=False, cpu=True)
    x = torch.randn(3, 1, 65)
    prefix.begin({"input_ids": torch.zeros(3, 1), "position_ids": torch.tensor([[1], [7], [0]])})
    with torch.no_grad():
        found = sparse(x)
        rows = torch.stack([x[0], masked(x[1], norms, 0.4), x[2]])
        torch.testing.assert_close(found, nn.functional.linear(rows, linear.weight, linear.bias))


def test_few_channels_are_listed_and_many_written(monkeypatch):
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: 30)
    product = CpuProduct(StoredWeight(linear_of(torch.float32, sizes=(64, 64))))
    taken = []
    for name in ("listed", "written"):
        monkeypatch.setattr(product, name, lambda *_, name=name: taken.append(name))
    for kept in (0, 30, 31, 64):
        product.masked(torch.ones(1, 64), (torch.arange(64) < kept)[None], None)
    assert taken == ["listed", "listed", "written", "written"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_list_holds_no_more_than_it_may(rows):
    x, keep = torch.ones(rows, 8), torch.zeros(rows, 8, dtype=torch.bool)
    keep[0, :5] = True
    kept = cpu_product.KeptList.within(x, keep, 5)
    assert kept is not None and kept.channels.tolist() == [0, 1, 2, 3, 4]
    assert cpu_product.KeptList.within(x, keep, 4) is None


def test_a_shape_is_timed_once_for_each_number_of_rows_and_threads(monkeypatch):
    monkeypatch.setattr(cpu_product, "_most_kept", {})
    timed = []
    monkeypatch.setattr(cpu_product, "quickest", lambda *calls: timed.extend(calls) or [1.0] * len(calls))
    products = [CpuProduct(StoredWeight(linear_of(torch.float32, sizes=(64, 32)))) for _ in range(2)]
    for product in products:
        for rows in (1, 1, 2):
            product.most(rows, torch.get_num_threads())
    assert len(timed) == 6  # dense, no channel and all, of one row and of two
    assert cpu_product._most_kept == {
        (64, 32, torch.float32, torch.get_num_threads(), rows): 64 * rows for rows in (1, 2)
    }


def test_weights_of_a_shape_take_turns_where_it_is_timed(monkeypatch):
    monkeypatch.setattr(cpu_product, "_most_kept", {})
    monkeypatch.setattr(cpu_product, "_alike", {})
    products = [CpuProduct(StoredWeight(linear_of(torch.float32, sizes=(64, 40)))) for _ in range(4)]
    other = CpuProduct(StoredWeight(linear_of(torch.float32, sizes=(40, 64))))
    used = []
    written = CpuProduct.written
    monkeypatch.setattr(CpuProduct, "written", lambda self, *given: used.append(self) or written(self, *given))
    products[0].most(3, torch.get_num_threads())
    assert set(used) == set(products) and other not in used


def test_what_is_never_worth_a_list_is_not_listed(monkeypatch):
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: -1)
    product = CpuProduct(StoredWeight(linear_of(torch.float32, sizes=(64, 64))))
    monkeypatch.setattr(cpu_product.KeptList, "of", None)
    assert not product.masked(torch.ones(1, 64), torch.zeros(1, 64, dtype=torch.bool), None).any()


def test_weights_that_cannot_be_cut_are_left_to_the_dense_product():
    linear = linear_of(torch.float32)
    linear.weight.data = torch.zeros(33, 130)[:, ::2]
    held = StoredWeight(linear)
    assert CpuProduct.takes(held) and CpuProduct(held).most(1, 1) >= -1  # holding it made it contiguous
    held.tensor.data = torch.zeros(65, 66)[:, :33].t()
    assert CpuProduct.takes(held) and CpuProduct(held).most(1, 1) == -1
    held.tensor.data = torch.zeros(33, 65)
    assert not CpuProduct.takes(held)


def test_spaced_weights_are_given_back_as_they_were(choice):
    linear = linear_of(torch.bfloat16, sizes=(20, 2048))
    before, x = linear.weight.detach().clone(), torch.randn(1, 20).bfloat16()
    sparse = SparseLinear(linear, column_norms(linear.weight, "l2"), 0.3, prefix=None, triton=False, cpu=True)
    with torch.no_grad():
        expected = nn.functional.linear(masked(x, sparse.norms, 0.3).double(), before.double(), linear.bias.double())
        torch.testing.assert_close(sparse(x).double(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(linear.weight, before)
    assert linear.weight.stride() == (1, 2080) or not compiles_here(torch.bfloat16)[0] or choice in ("bags", "dense")
    sparse.restore_layout()
    assert torch.equal(linear.weight, before) and linear.weight.is_contiguous()
    assert linear.weight.untyped_storage().nbytes() == before.untyped_storage().nbytes()


def test_columns_that_lie_so_already_are_not_copied():
    linear = linear_of(torch.bfloat16, sizes=(20, 2048))
    linear.weight.data = linear.weight.data.t().contiguous().t()
    where = linear.weight.data_ptr()
    SparseLinear(linear, column_norms(linear.weight, "l2"), 0.3, prefix=None, triton=False, cpu=True)
    assert linear.weight.data_ptr() == where and linear.weight.stride() == (1, 2048)


def test_gradients_reach_the_input_and_other_dtypes_are_cast_by_autocast(choice):
    linear = linear_of(torch.float32)
    sparse = SparseLinear(linear, column_norms(linear.weight, "l2"), 0.3, prefix=None, triton=False, cpu=True)
    x = torch.randn(1, 65, requires_grad=True)
    sparse(x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0.0).any())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sparse(x.detach().bfloat16()).dtype == torch.bfloat16
