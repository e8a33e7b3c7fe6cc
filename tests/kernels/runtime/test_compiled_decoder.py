"""Whole steps of a decoder by compiled code: long contexts, every mask, any number of threads."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.doubles.tiny_models import logits_of_steps, model_of, tiny_plan, tokens_of
from tests.kernels.products import compile_nothing, take
from was_kernels.ops.compiled_step import MOST_ROWS
from was_kernels.runtime.compiled_code import compiles_here
from was_kernels.runtime.compiled_decoder import CompiledDecoder
from was_kernels.runtime.sparse_model import sparsify
from was_search.plan import Plan

LONG = 150
"""Positions: more than two of the chunks that attention takes them in."""


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Rows of every step that compiled code took."""
    if not compiles_here()[0]:
        pytest.skip(compiles_here()[1])
    taken: list[int] = []
    run = CompiledDecoder.run

    def counted(self: CompiledDecoder, x: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        taken.append(len(x))
        return run(self, x, *args, **given)

    monkeypatch.setattr(CompiledDecoder, "run", counted)
    return taken


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def maskless(model: Any) -> Plan:
    """A plan without a threshold, so that no score can cross it by rounding."""
    plan = tiny_plan(model)
    return replace(plan, thresholds=np.zeros_like(plan.thresholds))


@pytest.mark.parametrize("batch", [1, 2, MOST_ROWS])
@pytest.mark.parametrize("padded", [False, True])
def test_long_contexts_equal_the_bags(batch, padded, steps, monkeypatch):
    model = model_of("llama", "cpu", torch.float32)
    tokens = tokens_of(batch, LONG)
    mask = torch.ones_like(tokens) if padded else None
    if mask is not None:
        mask[-1, :70] = 0  # a whole chunk of the last row is padding
    plan = maskless(model)
    with sparsify(model, plan) as sparse:
        found = logits_of_steps(sparse, tokens, LONG - 30, mask)
    assert steps == [batch] * 30
    compile_nothing(monkeypatch)
    with sparsify(model, plan) as sparse:
        expected = logits_of_steps(sparse, tokens, LONG - 30, mask)
    assert steps == [batch] * 30
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_number_of_threads_changes_no_bit(dtype, batch, steps, threads):
    model = model_of("qwen3", "cpu", dtype)
    tokens = tokens_of(batch, 90)
    with sparsify(model, tiny_plan(model)) as sparse, torch.inference_mode():
        cache = DynamicCache(config=model.config)
        sparse(tokens[:, :80], cache=cache, use_cache=True)
        prompt = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        found = []
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            cache = DynamicCache(config=model.config)
            for at, pair in enumerate(prompt):
                cache.update(*(each.clone() for each in pair), at)
            torch.set_num_threads(number)
            out = [
                model.model(input_ids=tokens[:, at : at + 1], cache=cache, use_cache=True)[0] for at in range(80, 90)
            ]
            found.append(torch.cat(out, 1))
    assert steps == [batch] * 40
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["bool", "float", "half", "every other"])
def test_masks_of_every_kind(kind, steps, monkeypatch):
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    model = model_of("llama", "cpu", dtype)
    tokens = tokens_of(2, 80)
    seen = torch.rand(2, 1, 1, 90, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[..., 79] = True
    if kind == "bool":
        mask = seen
    elif kind == "every other":
        mask = torch.stack((seen, ~seen), -1).flatten(3)[..., ::2]
    else:
        added = {"float": torch.float32, "half": torch.bfloat16}[kind]
        mask = torch.zeros(seen.shape, dtype=added).masked_fill(~seen, -torch.inf)
    plan = maskless(model)

    def last(sparse: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=90)
        with torch.inference_mode():
            sparse(tokens[:, :79], cache=cache, use_cache=True)
            positions = torch.full((2, 1), 79)
            given = {"attention_mask": mask, "position_ids": positions, "cache": cache, "use_cache": True}
            return sparse.model(input_ids=tokens[:, 79:], **given)[0]

    with sparsify(model, plan) as sparse:
        found = last(sparse)
    assert steps == [2]
    compile_nothing(monkeypatch)
    with sparsify(model, plan) as sparse:
        expected = last(sparse)
    tolerance = 0.05 if kind == "half" else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_more_rows_than_a_step_takes_go_map_by_map(steps):
    model = model_of("llama", "cpu", torch.float32)
    with sparsify(model, tiny_plan(model), dense_above=None) as sparse:
        logits_of_steps(sparse, tokens_of(MOST_ROWS + 1, 12), 8)
    assert not steps


def test_heads_that_no_vector_divides_are_left_to_torch(steps, monkeypatch):
    monkeypatch.setattr("was_kernels.runtime.compiled_decoder.compiled_step", lambda dtype: Lanes())
    model = model_of("llama", "cpu", torch.float32)
    with sparsify(model, tiny_plan(model)) as sparse:
        logits_of_steps(sparse, tokens_of(1, 12), 8)
    assert not steps


class Lanes:
    lanes = 48


def test_parameters_that_are_written_over_or_moved_count(steps, monkeypatch):
    take("compiled", monkeypatch)
    model = model_of("qwen2", "cpu", torch.float32)
    tokens = tokens_of(1, 12)
    plan = maskless(model)

    def changed() -> list[torch.Tensor]:
        norm, bias = model.model.layers[1].input_layernorm.weight, model.model.layers[0].self_attn.q_proj.bias
        found = [logits_of_steps(model, tokens, 8)]
        before = norm.data.clone(), bias.data
        with torch.no_grad():
            norm.mul_(2.0)
        found.append(logits_of_steps(model, tokens, 8))
        bias.data = bias.data + 3.0
        found.append(logits_of_steps(model, tokens, 8))
        norm.data.copy_(before[0])
        bias.data = before[1]
        return found

    with sparsify(model, plan):
        found = changed()
    with sparsify(model, plan, backend="reference"):
        expected = changed()
    assert steps == [1] * 12
    assert not torch.allclose(found[0], found[1], atol=1e-2) and not torch.allclose(found[1], found[2], atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_done_with_is_not_held(steps):
    model = model_of("llama", "cpu", torch.float32)
    with sparsify(model, tiny_plan(model)) as sparse, torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=20)
        sparse(tokens_of(1, 8), cache=cache, use_cache=True)
        sparse(tokens_of(1, 1), cache=cache, use_cache=True)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    assert steps == [1]
