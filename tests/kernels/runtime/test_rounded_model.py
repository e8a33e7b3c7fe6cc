"""A plan on a model with rounded weights, through the whole runtime."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles.tiny_models import (
    FAMILIES,
    assert_as_exact,
    assert_compiles,
    logits_of_replays,
    logits_of_steps,
    masked_logits,
    model_of,
    plan_apart,
    tiny_model,
    tiny_plan,
    tokens_of,
)
from tests.kernels.products import take
from was_kernels.runtime.compiled_decoder import CompiledDecoder
from was_kernels.runtime.sparse_linear import SparseLinear
from was_kernels.runtime.sparse_model import sparsify
from was_kernels.timing.step import projection_bytes
from was_search.checkpoints.quantised import QuantisedLinear, quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.errors import PlanError
from was_search.weight_format import WeightFormat

CLOSE = {"rtol": 0.0, "atol": 1e-9}
FORMS = [WeightFormat(8, 32), WeightFormat(4, 32), WeightFormat(4)]


def rounded(model: Any, form: WeightFormat) -> Any:
    quantise_projections(find_structure(model), form)
    return model


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_masked_model(family, form):
    model = rounded(tiny_model(family), form)
    plan = tiny_plan(model)
    assert plan.weights == str(form)
    tokens = tokens_of(2, 12)
    expected = masked_logits(model, plan, tokens)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        dense = model(tokens).logits
        with sparsify(model, plan) as sparse:
            assert sum(isinstance(m, SparseLinear) for m in sparse.modules()) == 14
            torch.testing.assert_close(sparse(tokens).logits, expected, **CLOSE)
            found = sparse.generate(tokens[:, :5], max_new_tokens=6, do_sample=False)
    assert (expected - dense).abs().max() > 1e-2  # the mask does something
    assert found.shape == (2, 11)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 14


def test_steps_equal_the_masked_model():
    model = rounded(tiny_model(), WeightFormat(4, 32))
    plan = tiny_plan(model)
    tokens = tokens_of(3, 12)
    expected = masked_logits(model, plan, tokens)
    with torch.inference_mode(), sparsify(model, plan) as sparse:
        cache = sparse(tokens[:, :6], use_cache=True).past_key_values
        for at in range(6, 12):
            found = sparse(tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(found[:, 0], expected[:, at], **CLOSE)


@pytest.mark.parametrize("has", ["none", "int8:32"])
def test_a_plan_for_other_weights_is_refused(has):
    model = tiny_model() if has == "none" else rounded(tiny_model(), WeightFormat(8, 32))
    plan = dataclasses.replace(tiny_plan(model), weights="int4:32")
    with pytest.raises(
        PlanError, match=rf"plan is for int4 weights in groups of 32 outputs \(int4:32\), the model has .*\({has}\)"
    ):
        sparsify(model, plan)


def test_counting_and_bytes():
    model = rounded(tiny_model(), WeightFormat(4, 32))
    structure = find_structure(model)
    form = WeightFormat(4, 32)
    held = sum(linear.in_features * form.row_bytes(linear.out_features) for _, _, linear in structure.linears())
    assert projection_bytes([linear for _, _, linear in structure.linears()]) == held
    plan = tiny_plan(model)
    handle = sparsify(model, plan)
    try:
        assert sum(p.channel_bytes * p.in_features for p in handle.projections) == held
        with handle.counting() as counts, torch.inference_mode():
            model.generate(tokens_of(1, 6), max_new_tokens=10, do_sample=False)
        assert 0.3 < counts.sparsity() < 0.7
    finally:
        handle.restore()


def exact_steps(model: Any, plan: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Those of the same rounded weights in float64."""
    exact = copy.deepcopy(model).double()
    with sparsify(exact, plan, backend="reference"):
        return logits_of_steps(exact, tokens, prompt)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_steps_equal_the_plain_path(op_device, dtype, family, batch, bits):
    # 344 is no multiple of 32: its blocks stay unfused.
    model = model_of(family, op_device, dtype, intermediate_size=352)
    rounded(model, WeightFormat(bits, 64))
    plan = tiny_plan(model)
    tokens = tokens_of(batch, 14).to(op_device)
    with sparsify(model, plan, backend="reference") as plain:
        expected = logits_of_steps(plain, tokens, 8)
    handle = sparsify(model, plan, backend="cuda")
    try:
        assert handle.fused == 2
        found = logits_of_steps(model, tokens, 8)
    finally:
        handle.restore()
    if op_device == "cpu":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_as_exact(found, expected, exact_steps(model, plan, tokens, 8))


@pytest.mark.parametrize("way", ["compiled", "dense"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_on_a_cpu_equal_the_plain_path(way, form, batch, dtype, monkeypatch):
    """By compiled code, nine rows by maps of their own; and by torch, where there is no compiler.

    Without masks in half precision, whose rounding moves scores across any threshold.
    """
    take(way, monkeypatch)
    model = rounded(model_of("qwen3", "cpu", dtype), form)
    tokens = tokens_of(batch, 14)
    plan = plan_apart(model, tiny_plan(model), tokens)
    if dtype != torch.float32:
        plan = dataclasses.replace(plan, thresholds=np.zeros_like(plan.thresholds))
    taken: list[int] = []
    run = CompiledDecoder.run
    monkeypatch.setattr(CompiledDecoder, "run", lambda self, x, *a, **k: taken.append(len(x)) or run(self, x, *a, **k))
    with sparsify(model, plan, backend="reference", dense_above=None) as plain:
        expected = logits_of_steps(plain, tokens, 8)
    handle = sparsify(model, plan, dense_above=None)
    try:
        assert handle.backend == "cpu" and handle.fused == 2
        found = logits_of_steps(model, tokens, 8)
    finally:
        handle.restore()
    assert taken == ([batch] * 6 if way == "compiled" and batch < 9 else [])
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_as_exact(found, expected, exact_steps(model, plan, tokens, 8))


def test_odd_widths_stay_unfused(op_device, dtype):
    model = rounded(model_of("llama", op_device, dtype), WeightFormat(4, 64))
    plan = tiny_plan(model)
    handle = sparsify(model, plan, backend="cuda")
    try:
        assert handle.fused == 0
        assert logits_of_steps(model, tokens_of(1, 12).to(op_device), 8).isfinite().all()
    finally:
        handle.restore()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_step_compiles_without_a_graph_break(op_device, dtype):
    model = rounded(model_of("llama", op_device, dtype, intermediate_size=352), WeightFormat(4, 64))
    plan = tiny_plan(model)
    tokens = tokens_of(1, 12).to(op_device)
    with sparsify(model, plan, backend="cuda") as sparse:
        assert_compiles(sparse, tokens, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_auto_takes_cuda_and_triton_agrees(cuda, bits):
    model = rounded(model_of("llama", "cuda", torch.bfloat16, intermediate_size=352), WeightFormat(bits, 64))
    plan = tiny_plan(model)
    tokens = tokens_of(2, 14).to(cuda)
    found = {}
    for backend in ("auto", "triton", "reference"):
        handle = sparsify(model, plan, backend=backend)
        assert handle.backend == {"auto": "cuda"}.get(backend, backend)
        found[backend] = logits_of_steps(model, tokens, 8)
        handle.restore()
    exact = exact_steps(model, plan, tokens, 8)
    assert_as_exact(found["auto"], found["reference"], exact)
    assert_as_exact(found["triton"], found["reference"], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_step_is_captured_in_a_cuda_graph(cuda, backend):
    model = rounded(model_of("llama", "cuda", torch.bfloat16, intermediate_size=352), WeightFormat(4, 64))
    plan = tiny_plan(model)
    tokens = tokens_of(1, 12).to(cuda)
    with sparsify(model, plan, backend=backend) as sparse:
        assert torch.equal(logits_of_replays(sparse, tokens, 8), logits_of_steps(sparse, tokens, 8))
