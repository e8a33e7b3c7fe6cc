"""Fused one-token steps of whole models: against the same plan on the plain path, greedy tokens and logits.

On CPU the fused ops are plain torch in the model's dtype: float32 there, so that hardly a mask differs. On a GPU the
kernels run, in half precision.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from tests.doubles.tiny_models import (
    FUSED_STEPS,
    WIDER,
    assert_as_exact,
    assert_compiles,
    logits_of_replays,
    logits_of_steps,
    model_of,
    tiny_plan,
    tokens_of,
)
from was_kernels.runtime import decode_block
from was_kernels.runtime.sparse_model import sparsify


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    step = decode_block.DecodeBlock.step

    def counted(self: Any, x: torch.Tensor, *others: Any) -> Any:
        taken.append(x.shape[0])
        return step(self, x, *others)

    monkeypatch.setattr(decode_block.DecodeBlock, "step", counted)
    return taken


@pytest.mark.parametrize("family", FUSED_STEPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_steps_equal_the_plain_path(family, batch, op_device, dtype, monkeypatch):
    model = model_of(family, op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(batch, 20).to(op_device)
    taken = steps_taken(monkeypatch)
    with sparsify(copy.deepcopy(model).double(), plan, backend="reference") as exact:
        expected = logits_of_steps(exact, tokens, 8)
    with sparsify(model, plan, backend="reference") as sparse:
        plain = logits_of_steps(sparse, tokens, 8)
    assert not taken
    handle = sparsify(model, plan, backend="cuda", graphs=False)
    assert handle.fused == 2
    found = logits_of_steps(model, tokens, 8)
    assert taken == [batch] * 24
    handle.restore()
    assert type(model.model.layers[0]).__mro__[1].__name__ == "GradientCheckpointingLayer"
    assert_as_exact(found, plain, expected)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_shared_masks(family, batch, op_device, dtype, monkeypatch):
    model = model_of(family, op_device, dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = tiny_plan(model, masks="shared")
    tokens = tokens_of(batch, 16).to(op_device)
    with sparsify(copy.deepcopy(model).double(), plan, backend="reference") as exact:
        expected = logits_of_steps(exact, tokens, 8)
    with sparsify(model, plan, backend="reference") as sparse:
        plain = logits_of_steps(sparse, tokens, 8)
    taken = steps_taken(monkeypatch)
    handle = sparsify(model, plan, backend="cuda", graphs=False)
    found = logits_of_steps(model, tokens, 8)
    assert taken == [batch] * 16
    handle.restore()
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) and after[name].is_contiguous() for name, t in before.items())
    assert_as_exact(found, plain, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_left_padding(family, op_device, dtype, monkeypatch):
    model = model_of(family, op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(2, 16).to(op_device)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    tokens[1, :5] = 0
    taken = steps_taken(monkeypatch)
    with sparsify(model, plan, backend="cuda", graphs=False) as sparse:
        padded = logits_of_steps(sparse, tokens, 10, mask)
        alone = logits_of_steps(sparse, tokens[1:, 5:], 5)
    assert taken
    # Half precision: the plain path differs between the two as well, where masks differ in a few channels.
    with sparsify(model, plan, backend="reference") as sparse:
        usual = (
            logits_of_steps(sparse, tokens, 10, mask)[:, 1] - logits_of_steps(sparse, tokens[1:, 5:], 5)[:, 0]
        ).abs()
    assert (padded[:, 1] - alone[:, 0]).abs().mean() < 2.0 * usual.mean() + 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_with_both_caches(batch, op_device, dtype, monkeypatch):
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(batch, 7).to(op_device)
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    with sparsify(model, plan, backend="reference") as sparse:
        expected = sparse.generate(tokens, **options)
    taken = steps_taken(monkeypatch)
    with sparsify(model, plan, backend="cuda") as sparse:
        dynamic = sparse.generate(tokens, **options)
        assert taken
        taken.clear()
        static = sparse.generate(tokens, cache_implementation="static", **options)
    assert taken
    if op_device == "cpu":
        assert torch.equal(dynamic, expected)
        assert torch.equal(static, expected)
    assert static.shape == expected.shape


def test_steps_that_are_not_covered_take_the_plain_path(op_device, dtype, monkeypatch):
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    taken = steps_taken(monkeypatch)
    tokens = tokens_of(17, 12).to(op_device)
    handle = sparsify(model, plan, backend="cuda", graphs=False)
    logits_of_steps(model, tokens, 10)  # more rows than a launch takes
    with torch.inference_mode():
        model(tokens[:1, :1])  # no cache
    with handle.counting() as counts:
        logits_of_steps(model, tokens[:1], 10)
    assert not taken
    assert counts.tokens == 2
    handle.restore()
    with sparsify(model, plan, backend="cuda", dense_above=2, graphs=False) as sparse:
        logits_of_steps(sparse, tokens[:3], 10)
        assert not taken
        logits_of_steps(sparse, tokens[:2], 10)
    assert set(taken) == {2}


def test_other_families_run_without_fused_blocks(op_device, dtype):
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**{**WIDER, "num_key_value_heads": 4})).eval().to(op_device, dtype)
    assert not decode_block.fits(model.model.layers[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_step_compiles_without_a_graph_break(op_device, dtype):
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(1, 12).to(op_device)
    with sparsify(model, plan, backend="cuda", graphs=False) as sparse:
        assert_compiles(sparse, tokens, 8)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_cuda_graph(cuda):
    model = model_of("qwen3", "cuda", torch.bfloat16)
    plan = tiny_plan(model)
    tokens = tokens_of(1, 12).to(cuda)
    with sparsify(model, plan) as sparse:
        assert torch.equal(logits_of_replays(sparse, tokens, 8), logits_of_steps(sparse, tokens, 8))
