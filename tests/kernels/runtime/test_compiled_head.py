"""A model's head by compiled code: few rows for inference only, and the model's own afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.doubles.tiny_models import model_of, tiny_plan, tokens_of
from tests.kernels.products import compile_nothing
from was_kernels.ops.compiled_step import CompiledStep
from was_kernels.runtime import compiled_head
from was_kernels.runtime.compiled_code import compiles_here
from was_kernels.runtime.compiled_head import CompiledHead, compile_head
from was_kernels.runtime.fused_forward import unfuse
from was_kernels.runtime.sparse_model import sparsify


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Rows of every product that compiled code made, whatever is faster."""
    if not compiles_here()[0]:
        pytest.skip(compiles_here()[1])
    monkeypatch.setattr(CompiledHead, "_is_worth", lambda self, rows: True)
    made: list[int] = []
    dense = CompiledStep.dense

    def counted(self: CompiledStep, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return dense(self, x, weight)

    monkeypatch.setattr(CompiledStep, "dense", counted)
    return made


class Model(nn.Module):
    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> Any:
        return self.head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_are_compiled(dtype, products):
    head = nn.Linear(70, 33, bias=False, dtype=dtype)
    assert compile_head(Model(head)) is head
    own = copy.copy(head)
    unfuse(own)
    shapes = [(70,), (1, 70), (2, 1, 70), (8, 70), (9, 70), (0, 70)]
    with torch.inference_mode():
        for shape in shapes:
            x = torch.randn(shape).to(dtype)
            expected = nn.functional.linear(x.double(), head.weight.double())
            torch.testing.assert_close(head(x).double(), expected, rtol=1e-2, atol=1e-2)
            assert head(x).shape == expected.shape
    assert products == [rows for rows in (1, 1, 2, 8) for _ in range(2)]
    assert type(head).__mro__[1] is nn.Linear
    unfuse(head)
    assert type(head) is nn.Linear and "_was_step" not in vars(head)


def test_all_else_is_the_heads_own(products):
    head = nn.Linear(70, 33, bias=False)
    compile_head(Model(head))
    x = torch.randn(1, 70)
    head(x).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            head(torch.ones(1, 69))
        with pytest.raises(RuntimeError):
            head(x.double())
        torch.testing.assert_close(head(input=x), head(x))
        assert products == [1]
        torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))
    assert products == [1, 1]


@pytest.mark.parametrize("head", [None, nn.Linear(4, 3), nn.Linear(4, 3, bias=False).double(), nn.Embedding(3, 4)])
def test_other_heads_are_left(head, products):
    assert compile_head(Model(head)) is None
    assert compile_head(nn.Module()) is None


def test_without_a_compiler_it_is_left(monkeypatch):
    compile_nothing(monkeypatch)
    assert compile_head(Model(nn.Linear(4, 3, bias=False))) is None


def test_what_is_faster_is_measured_once(monkeypatch):
    if not compiles_here()[0]:
        pytest.skip(compiles_here()[1])
    monkeypatch.setattr(compiled_head, "_is_faster", {})
    seconds = iter([(1.0, 2.0), (2.0, 1.0)])
    monkeypatch.setattr(compiled_head, "quickest", lambda *calls: [call() for call in calls] and next(seconds))
    head = nn.Linear(70, 33, bias=False)
    compile_head(Model(head))
    step: CompiledHead = head._was_step  # type: ignore[assignment]
    assert [step._is_worth(rows) for rows in (1, 2, 1, 2)] == [True, False, True, False]


def test_steps_of_a_model_end_with_it(products):
    model = model_of("llama", "cpu", torch.float32)
    tokens = tokens_of(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with sparsify(model, tiny_plan(model), backend="reference") as sparse:
        expected = sparse.generate(tokens, **options)
        assert not products
    with sparsify(model, tiny_plan(model)) as sparse:
        assert torch.equal(sparse.generate(tokens, **options), expected)
    assert products == [2] * 6
    assert type(model.lm_head) is nn.Linear
