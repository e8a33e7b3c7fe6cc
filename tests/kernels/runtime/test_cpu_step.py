"""Whole decoding steps on a CPU by few calls, beside the reference backend and in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tests.doubles.tiny_models import (
    FUSED_FAMILIES,
    FUSED_STEPS,
    WIDER,
    assert_as_exact,
    assert_compiles,
    logits_of_steps,
    masked_logits,
    model_of,
    plan_apart,
    tiny_model,
    tiny_plan,
    tokens_of,
)
from tests.kernels.products import WAYS, take
from was_kernels.runtime import masked_group
from was_kernels.runtime.cpu_step import CpuModel
from was_kernels.runtime.sparse_model import sparsify
from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.service.steps.demonstration import DEMO_FOLDER

DEMO = DEMO_FOLDER / "model"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that a decoder took itself."""
    taken: list[int] = []
    run = CpuModel.run

    def counted(self: CpuModel, given: dict[str, Any]) -> Any:
        taken.append(len(given["input_ids"]))
        return run(self, given)

    monkeypatch.setattr(CpuModel, "run", counted)
    return taken


@pytest.fixture(params=WAYS)
def choice(request, monkeypatch):
    """Which product is taken, whatever is faster."""
    take(request.param, monkeypatch)


ROWS = [(batch, prefix) for batch in (1, 3) for prefix in (1, 12, 0)]
"""All of them with one family; the others see each number of rows and each prefix once."""


@pytest.mark.parametrize(
    ("family", "batch", "prefix"),
    [(family, *rows) for family in FUSED_STEPS for rows in (ROWS if family == "llama" else [(1, 1), (3, 12), (3, 0)])],
)
def test_equals_the_reference(family, batch, prefix, runs, choice):
    model = model_of(family, "cpu", torch.float32)
    tokens = tokens_of(batch, 20)
    plan = plan_apart(model, tiny_plan(model, dense_prefix=prefix), tokens)
    with sparsify(model, plan, backend="reference") as sparse:
        expected = logits_of_steps(sparse, tokens, 8)
    with sparsify(model, plan, backend="cpu") as sparse:
        found = logits_of_steps(sparse, tokens, 8)
    assert runs == [batch] * 12
    # float32 sums in another order; a flipped mask would show as 1e-2.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision_is_as_exact_as_the_reference(half, batch, runs, choice):
    model = model_of("llama", "cpu", half)
    plan = tiny_plan(model)
    tokens = tokens_of(batch, 20, 9)
    with sparsify(copy.deepcopy(model).double(), plan, backend="reference") as exact:
        expected = logits_of_steps(exact, tokens, 8)
    with sparsify(model, plan, backend="reference") as sparse:
        plain = logits_of_steps(sparse, tokens, 8)
    with sparsify(model, plan, backend="cpu") as sparse:
        found = logits_of_steps(sparse, tokens, 8)
    assert runs == [batch] * 12
    assert_as_exact(found.double(), plain.double(), expected)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("family", FUSED_STEPS)
def test_generate_takes_these_steps_by_itself(family, cache, runs):
    model = model_of(family, "cpu", torch.float32)
    plan = tiny_plan(model)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    tokens = tokens_of(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # padded on the left
    for given in ({}, {"attention_mask": mask}):
        with sparsify(model, plan, backend="reference") as sparse:
            expected = sparse.generate(tokens, **given, **options)
        runs.clear()
        with sparsify(model, plan) as sparse:
            found = sparse.generate(tokens, **given, **options)
        assert runs == [2] * 7
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["gemma2", *FUSED_FAMILIES])
def test_other_families_take_bags_map_by_map(family, runs):
    model = tiny_model(family, torch.float32)
    plan = tiny_plan(model, masks="shared" if family in FUSED_FAMILIES else "separate")
    tokens = tokens_of(2, 12)
    expected = masked_logits(model, plan, tokens)
    with sparsify(model, plan) as sparse, torch.inference_mode():
        step = sparse(tokens[:, :4], use_cache=True)
        found = [step.logits]
        for at in range(4, 12):
            step = sparse(tokens[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    assert not runs
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-3, atol=1e-3)


def test_shared_masks_are_listed_once(monkeypatch):
    take("bags", monkeypatch)
    model = model_of("llama", "cpu", torch.float32)
    plan = tiny_plan(model, masks="shared")
    tokens = tokens_of(1, 20)
    with sparsify(model, plan, backend="reference") as sparse:
        expected = logits_of_steps(sparse, tokens, 8)
    lists: list[int] = []
    of = masked_group.KeptList.of
    monkeypatch.setattr(masked_group.KeptList, "of", staticmethod(lambda x, keep: lists.append(1) or of(x, keep)))
    with sparsify(model, plan) as sparse:
        found = logits_of_steps(sparse, tokens, 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Twelve steps; of two blocks with four inputs each, one input keeps every channel and needs no list.
    assert len(lists) == 12 * 7


def test_more_rows_than_dense_above_keep_every_channel(runs):
    model = model_of("llama", "cpu", torch.float32)
    plan = tiny_plan(model, sparsity=0.8, dense_prefix=0)
    tokens = tokens_of(3, 12)
    found = {}
    for above in (2, 3, None):
        with sparsify(model, plan, dense_above=above) as sparse:
            found[above] = logits_of_steps(sparse, tokens, 8)
    assert runs == [3] * 12
    assert torch.equal(found[3], found[None])
    assert not torch.allclose(found[2], found[3], atol=1e-2)


def test_counting_is_of_the_modules_and_counts_the_same(runs):
    model = model_of("llama", "cpu", torch.float32)
    plan = tiny_plan(model, dense_prefix=10)
    shares = []
    for backend in ("reference", "cpu"):
        handle = sparsify(model, plan, backend=backend)
        with handle.counting() as counts:
            logits_of_steps(model, tokens_of(2, 20), 8)
        shares.append((counts.tokens, counts.achieved()))
        handle.restore()
    assert not runs
    assert shares[0][0] == shares[1][0] == 20
    np.testing.assert_array_equal(shares[0][1], shares[1][1])


def test_norms_that_are_written_over_make_other_masks(runs):
    model = model_of("llama", "cpu", torch.float32)
    tokens = tokens_of(1, 12)
    found: dict[str, list[torch.Tensor]] = {"reference": [], "cpu": []}
    for backend, logits in found.items():
        handle = sparsify(model, tiny_plan(model), backend=backend)
        for factor in (1.0, 0.5, 2.0):
            with torch.inference_mode():
                for projection in handle.projections:
                    projection.norms.mul_(factor)
            logits.append(logits_of_steps(model, tokens, 8))
        handle.restore()
    assert len(runs) == 12
    assert not torch.allclose(found["cpu"][0], found["cpu"][1], atol=1e-2)
    torch.testing.assert_close(found["cpu"], found["reference"], rtol=1e-4, atol=1e-4)


def test_a_hook_is_called(runs):
    model = model_of("llama", "cpu", torch.float32)
    seen: list[Any] = []
    with sparsify(model, tiny_plan(model)) as sparse:
        hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: seen.append(args))
        logits_of_steps(sparse, tokens_of(1, 12), 8)
        hook.remove()
        assert (len(seen), runs) == (5, [])
        logits_of_steps(sparse, tokens_of(1, 12), 8)
    assert (len(seen), runs) == (5, [1] * 4)


def test_what_no_step_covers_is_left_to_transformers(runs):
    model = model_of("llama", "cpu", torch.float32)
    tokens = tokens_of(1, 10)
    with sparsify(model, tiny_plan(model)) as sparse, torch.inference_mode():
        full = StaticCache(config=model.config, max_cache_len=8)
        sparse(tokens[:, :8], past_key_values=full, use_cache=True)
        with pytest.raises((RuntimeError, IndexError)):
            sparse(tokens[:, 8:9], past_key_values=full, use_cache=True)
        cache = DynamicCache(config=model.config)
        sparse(tokens[:, :8], past_key_values=cache, use_cache=True)
        sparse(tokens[:, 8:9], past_key_values=cache, use_cache=True, output_hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            sparse(tokens[:, 9:], past_key_values=cache, use_cache=True)
    assert not runs


def test_scaled_angles(runs):
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**WIDER, rope_parameters=rope)).eval()
    plan = tiny_plan(model)
    with sparsify(model, plan, backend="reference") as sparse:
        expected = logits_of_steps(sparse, tokens_of(1, 20), 8)
    with sparsify(model, plan) as sparse:
        found = logits_of_steps(sparse, tokens_of(1, 20), 8)
    assert len(runs) == 12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_as_it_was_afterwards(runs):
    model = model_of("llama", "cpu", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    with sparsify(model, tiny_plan(model)) as sparse:
        sparse.generate(tokens_of(1, 5), max_new_tokens=6, do_sample=False)
    assert runs
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].stride() == strides[name] for name in before)
    assert "_was_step" not in vars(model.model)
    runs.clear()
    model.generate(tokens_of(1, 5), max_new_tokens=6, do_sample=False)
    assert not runs


@pytest.mark.slow
def test_torch_compile_takes_the_dense_way(runs):
    model = model_of("llama", "cpu", torch.float32)
    with sparsify(model, tiny_plan(model)) as sparse:
        assert_compiles(sparse, tokens_of(1, 12), 8)
    assert len(runs) == 4  # of the expected logits


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_texts_of_the_demo_checkpoint_equal_the_references(sparsity, runs):
    model = load_model(str(DEMO), dtype="float32")
    tokens = load_tokenizer(str(DEMO))("def main(arguments):\n    ", return_tensors="pt").input_ids
    plan = tiny_plan(model, sparsity=sparsity)
    texts = []
    for backend in ("reference", "cpu"):
        with sparsify(model, plan, backend=backend) as sparse:
            texts.append(sparse.generate(tokens, max_new_tokens=80, do_sample=False, pad_token_id=0).tolist())
    assert runs
    assert texts[0] == texts[1]
