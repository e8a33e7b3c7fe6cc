"""Compiled products of a model's maps: taken where faster, as they are now, and done without where there are none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.doubles.tiny_models import logits_of_steps, model_of, tiny_plan, tokens_of
from tests.kernels.products import compile_nothing, take
from was_kernels.ops.column_bags import KeptList
from was_kernels.runtime import compiled_code, compiled_product
from was_kernels.runtime.compiled_code import compiled_step, compiles_here
from was_kernels.runtime.compiled_product import CompiledProduct, most_worth
from was_kernels.runtime.masked_group import MaskedGroup
from was_kernels.runtime.sparse_linear import SparseLinear
from was_kernels.runtime.sparse_model import sparsify
from was_search.masks.score import column_norms, masked

D = 65


@pytest.fixture
def no_answers(monkeypatch):
    """Nothing was measured or compiled in this process yet."""
    compiled_code._step_of.cache_clear()
    monkeypatch.setattr(compiled_product, "_most_kept", {})
    monkeypatch.setattr(compiled_product, "_alike", {})
    yield
    compiled_code._step_of.cache_clear()


def sparse_map(width: int, threshold: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> SparseLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(D, width, dtype=dtype)
    norms = column_norms(linear.weight, "l2").float()
    return SparseLinear(linear, norms, threshold, prefix=None, triton=False, cpu=True)


def expected(held: SparseLinear, x: Tensor) -> Tensor:
    kept = masked(x, held.norms, held.threshold) if held.threshold else x
    return nn.functional.linear(kept, held.weight, held.bias)


@torch.no_grad()
def test_maps_of_one_input_are_one_call(monkeypatch):
    take("compiled", monkeypatch)
    maps = [sparse_map(33, 0.3), sparse_map(8, 0.0, 1), sparse_map(70, 0.5, 2)]
    group = MaskedGroup(maps)
    monkeypatch.setattr(KeptList, "of", None)  # no list is made
    for rows in (1, 3, 16):
        x = torch.randn(rows, D)
        found = group(x, None)
        assert group.compiles(rows) and torch.equal(torch.cat(found, 1), group.beside(x, None))
        for y, held in zip(found, maps, strict=True):
            torch.testing.assert_close(y, expected(held, x))
    x = torch.randn(1, D)
    for y, held in zip(group(x, None, skip=False), maps, strict=True):
        torch.testing.assert_close(y, nn.functional.linear(x, held.weight, held.bias))
    assert not group.compiles(17) and not group.compiles(2, skip=False)


@torch.no_grad()
@pytest.mark.parametrize("way", ["compiled", "bags", "dense"])
def test_a_map_is_as_it_is_now(way, monkeypatch):
    """Norms that are written over, and a bias in another place, count from the next step on."""
    take(way, monkeypatch)
    held, x = sparse_map(33, 0.3), torch.randn(1, D)
    group = MaskedGroup([held])
    for change in (lambda: None, lambda: held.norms.mul_(0.5), lambda: _move(held.bias), lambda: held.bias.add_(1.0)):
        change()
        group.forget()
        torch.testing.assert_close(held(x), expected(held, x))
        torch.testing.assert_close(group(x, None)[0], expected(held, x))


def _move(bias: nn.Parameter) -> None:
    bias.data = bias.data * 2.0


@torch.no_grad()
def test_what_was_measured_is_kept(no_answers, monkeypatch):
    if not compiles_here()[0]:
        pytest.skip(compiles_here()[1])
    timed: list[Any] = []
    seconds = [8.0, 2.0, 10.0]
    monkeypatch.setattr(compiled_product, "quickest", lambda *calls: timed.extend(c() for c in calls) or seconds)
    products = [CompiledProduct.of([sparse_map(32, 0.3, seed).held]) for seed in range(3)]
    for product in products:
        assert product is not None
        assert product.is_worth(1, 2) and product.is_worth(1, 2, 0.3) and not product.is_worth(1, 2, 0.2)
        assert product.is_worth(2, 2, 0.6) and not product.is_worth(2, 2, 0.4)
    assert len(timed) == 6  # dense, no channel and all, of one row and of two
    assert compiled_product._most_kept == {
        (D, ((32, 32, 1),), torch.float32, 2, rows): most_worth(8.0, 2.0, 10.0, D) for rows in (1, 2)
    }


@pytest.mark.parametrize(
    ("dense", "empty", "full", "most"),
    [(8.0, 2.0, 10.0, 75), (10.0, 2.0, 10.0, 100), (12.0, 2.0, 10.0, 100), (2.0, 2.0, 10.0, -1), (1.0, 2.0, 10.0, -1)],
)
def test_how_many_channels_are_worth_a_list(dense, empty, full, most):
    assert most_worth(dense, empty, full, 100) == most


def test_without_a_compiler_torch_makes_the_same_products(no_answers, monkeypatch, tmp_path):
    model = model_of("llama", "cpu", torch.float32)
    plan, tokens = tiny_plan(model), tokens_of(2, 16)
    with sparsify(copy.deepcopy(model), plan) as sparse:
        usual = logits_of_steps(sparse, tokens, 8)
    compiled_code._step_of.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiles_here() == (False, f"CXX: {str(tmp_path / 'none')!r} is no C++ compiler that can be run")
    assert compiled_step(torch.bfloat16) is None
    handle = sparsify(model, plan)
    assert handle.backend == "cpu" and handle.uncompiled_because == compiles_here()[1]
    found = logits_of_steps(model, tokens, 8)
    # float32 sums in another order; a flipped mask would show as 1e-2.
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.iterdir())


def test_libraries_are_kept_in_the_users_cache(no_answers, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good, why_not = compiles_here()
    if not good:
        pytest.skip(why_not)
    assert [path.suffix for path in (tmp_path / "was-search" / "compiled").iterdir()] == [".so"]


@pytest.mark.parametrize("home", [RuntimeError("no home"), Path("~/.cache/was-search")])
def test_nobodys_home_keeps_nothing(home, monkeypatch):
    def found(name: str) -> Path:
        if isinstance(home, Path):
            return home
        raise home

    monkeypatch.setattr(compiled_code, "user_cache_path", found)
    assert compiled_code._folder() is None


def test_why_a_model_is_not_compiled(monkeypatch):
    take("compiled", monkeypatch)
    model = model_of("llama", "cpu", torch.float32)
    for backend, why_not in (("cpu", None), ("reference", None)):
        handle = sparsify(model, tiny_plan(model), backend=backend)
        assert handle.uncompiled_because == why_not
        handle.restore()
    compile_nothing(monkeypatch)
    for backend, why_not in (("cpu", "no compiler"), ("reference", None)):
        handle = sparsify(model, tiny_plan(model), backend=backend)
        assert handle.uncompiled_because == why_not
        handle.restore()
