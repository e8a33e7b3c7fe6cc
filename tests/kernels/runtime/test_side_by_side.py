"""Projections in one weight: masks by ranges of its rows, beside float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.kernels.products import WAYS, compile_nothing, take
from was_kernels.ops.gather_launch import new_workspace
from was_kernels.ops.vllm_linear import made_by, vllm_linear
from was_kernels.runtime.compiled_product import CompiledProduct
from was_kernels.runtime.cpu_product import CpuProduct
from was_kernels.runtime.side_by_side import Part, SideBySide
from was_kernels.runtime.sparse_linear import DENSE_ABOVE

D = 72
WIDTHS = (48, 16, 24)


def case(dtype: torch.dtype, *, shared: bool = False) -> tuple[Tensor, list[Part]]:
    """A weight of three projections, of which the second is dense unless all share a mask."""
    make = torch.Generator().manual_seed(0)
    weight = torch.randn((sum(WIDTHS), D), generator=make).to(dtype)
    norms = [torch.rand(D, generator=make) + 0.5 for _ in WIDTHS]
    thresholds = [0.7, 0.0, 1.1]
    if shared:
        norms, thresholds = norms[:1] * 3, thresholds[:1] * 3
    return weight, [Part(w, n, t, 0.5 if t else 0.0) for w, n, t in zip(WIDTHS, norms, thresholds, strict=True)]


def corrected(parts: list[Part]) -> list[Part]:
    make = torch.Generator().manual_seed(4)
    drawn = [torch.randn((2, part.width), generator=make) for part in parts]
    pairs = zip(parts, drawn, strict=True)
    return [replace(part, compensation=(1.0 + pair[0] / 8, pair[1] / 4)) for part, pair in pairs]


def exact(
    x: Tensor, weight: Tensor, parts: list[Part], dense: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The outputs in float64, map by map, of what is kept."""
    products = []
    ends = [0, *torch.tensor([part.width for part in parts]).cumsum(0).tolist()]
    for (start, end), part in zip(pairwise(ends), parts, strict=True):
        keep = x.abs().float() * part.norms >= part.threshold
        if dense is not None:
            keep |= dense[:, None]
        y = (x.double() * keep) @ weight[start:end].double().T
        y = y if bias is None else y + bias[start:end].double()
        if part.compensation is not None:
            scale, constant = (vector.double() for vector in part.compensation)
            masked = torch.ones(len(x), dtype=torch.bool) if dense is None else ~dense
            y = torch.where(masked[:, None], scale * y + constant, y)
        products.append(y)
    return torch.cat(products, 1)


@pytest.fixture(params=WAYS)
def choice(request, monkeypatch):
    """Which product is taken, whatever is faster."""
    take(request.param, monkeypatch)


def close(found: Tensor, expected: Tensor) -> None:
    """To the rounding of the result; sums of 72 products are float32 at least."""
    step = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-2}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=step, atol=4 * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_one_row_is_masked_by_ranges_of_rows(dtype, shared, choice):
    weight, parts = case(dtype, shared=shared)
    held = SideBySide(weight, parts)
    assert len(held.maps) == (1 if shared else 3)
    x = torch.randn((1, D), generator=torch.Generator().manual_seed(1)).to(dtype)
    close(held.step(x), exact(x, weight, parts))
    close(held.step(x, torch.tensor([True])), x.double() @ weight.double().T)
    close(held.whole(x), x.double() @ weight.double().T)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernel", ["compiled", "bags", "cuda", "none"])
def test_masked_rows_are_corrected_before_the_callers_bias(shared, kernel, monkeypatch):
    if kernel in WAYS:
        take(kernel, monkeypatch)
    else:
        monkeypatch.setattr(CpuProduct, "takes", staticmethod(lambda held: False))
    dtype = torch.bfloat16 if kernel == "cuda" else torch.float32
    weight, parts = case(dtype, shared=shared)
    parts, bias = corrected(parts), torch.randn(sum(WIDTHS), generator=torch.Generator().manual_seed(5)).to(dtype)
    workspace = new_workspace(torch.device("cpu")) if kernel == "cuda" else None
    x = torch.randn((3, D), generator=torch.Generator().manual_seed(6)).to(dtype)
    dense = torch.tensor([False, True, False])
    for own in (bias, None):
        held, added = SideBySide(weight, parts, workspace=workspace, bias=own), 0.0 if own is None else own.double()
        assert len(held.maps) == (1 if shared else 3)
        for rows, flags in ((x, dense), (x, None), (x[:1], None)):
            close(held.step(rows, flags).double() + added, exact(rows, weight, parts, flags, own))
        close(held.whole(x), x.double() @ weight.double().T)


def test_the_weight_is_copied():
    weight, parts = case(torch.float32)
    x, before = torch.randn(1, D), weight.clone()
    held = SideBySide(weight, parts)
    assert torch.equal(weight, before)
    weight.zero_()
    close(held.whole(x), x.double() @ before.double().T)


@pytest.mark.parametrize("rows", [2, DENSE_ABOVE])
def test_rows_have_masks_of_their_own_where_that_is_faster(rows, monkeypatch):
    compile_nothing(monkeypatch)
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: rows * D)
    weight, parts = case(torch.float32)
    held = SideBySide(weight, parts)
    x = torch.randn((rows, D), generator=torch.Generator().manual_seed(2))
    dense = torch.arange(rows) == 1
    assert held.is_worth(rows)
    close(held.step(x, dense), exact(x, weight, parts, dense))


def test_more_rows_than_are_worth_it_are_dense(monkeypatch):
    """Masks at 50 % leave half of the channels of each row to be read."""
    compile_nothing(monkeypatch)
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: int(1.5 * D))
    weight, parts = case(torch.float32)
    held = SideBySide(weight, parts)
    assert [rows for rows in range(12) if held.is_worth(rows)] == [1, 2, 3]
    x = torch.randn(4, D)
    close(held.step(x), x.double() @ weight.double().T)
    close(held.step(x[:3]), exact(x[:3], weight, parts))


@pytest.mark.parametrize(("most", "worth"), [(D, 8), (0.84 * D, 6), (0.76 * D, 4), (0.5 * D, 2), (-1, 1)])
def test_compiled_code_reads_what_any_row_keeps(most, worth, monkeypatch):
    """At 75 % one row keeps a quarter of the channels, two keep 44 %, four 68 %, and six 82 %."""
    take("compiled", monkeypatch)
    monkeypatch.setattr(CompiledProduct, "_measured", lambda self, rows, threads: most)
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: -1)
    weight, parts = case(torch.float32)
    held = SideBySide(weight, [replace(part, sparsity=0.75) for part in parts])
    assert max(rows for rows in range(12) if held.is_worth(rows)) == worth
    x = torch.randn((worth, D), generator=torch.Generator().manual_seed(2))
    close(held.step(x), exact(x, weight, parts))


def test_one_row_is_masked_even_where_nothing_is_gained(monkeypatch):
    compile_nothing(monkeypatch)
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: -1)
    held = SideBySide(*case(torch.float32))
    assert [rows for rows in range(12) if held.is_worth(rows)] == [1]


@pytest.mark.parametrize("rows", [1, 5])
def test_the_cuda_op_takes_all_projections_at_once(rows, monkeypatch):
    """On a CPU the op is plain torch: what is tested is what it is given."""
    monkeypatch.setattr(CpuProduct, "takes", staticmethod(lambda held: False))
    weight, parts = case(torch.bfloat16)
    held = SideBySide(weight, parts, workspace=new_workspace(torch.device("cpu")))
    assert held._workspace is not None and held._bags is None
    x = torch.randn((rows, D), generator=torch.Generator().manual_seed(3)).bfloat16()
    dense = torch.arange(rows) == 2
    close(held.step(x, dense), exact(x, weight, parts, dense))
    many = torch.randn(DENSE_ABOVE + 1, D).bfloat16()
    close(held.step(many), many.double() @ weight.double().T)


def test_where_no_kernel_fits_inputs_are_masked(monkeypatch):
    monkeypatch.setattr(CpuProduct, "takes", staticmethod(lambda held: False))
    weight, parts = case(torch.float32)
    held = SideBySide(weight, parts, workspace=new_workspace(torch.device("cpu")))  # float32: not the kernel's
    assert held._workspace is None
    x = torch.randn(3, D)
    close(held.step(x), exact(x, weight, parts))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_on_a_gpu(rows, cuda):
    weight, parts = case(torch.bfloat16)
    held = SideBySide(weight.to(cuda), parts, workspace=new_workspace(cuda))
    x = torch.randn((rows, D), generator=torch.Generator().manual_seed(3)).bfloat16()
    dense = torch.arange(rows) == 0
    close(held.step(x.to(cuda), dense.to(cuda)).cpu(), exact(x, weight, parts, dense))
    close(held.whole(x.to(cuda)).cpu(), x.double() @ weight.double().T)


def test_the_op_is_opaque_and_asks_by_name(monkeypatch):
    monkeypatch.setattr("was_kernels.ops.vllm_linear._products", [])
    with pytest.raises(RuntimeError, match="only a model that vLLM has loaded can be run"):
        vllm_linear(torch.ones(1, 4), "a", 2)
    made_by(lambda x, name: x[:, :2] * len(name))
    made_by(lambda x, name: x[:, :3] * len(name))  # the last one counts
    whole = torch.compile(lambda x: vllm_linear(x, "abc", 3) + 1, backend="eager", fullgraph=True, dynamic=True)
    for rows in (1, 7):
        assert torch.equal(whole(torch.ones(rows, 4)), torch.full((rows, 3), 4.0))
    torch.library.opcheck(torch.ops.was_vllm.linear.default, (torch.ones(5, 4), "abc", 3))
