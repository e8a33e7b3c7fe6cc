"""Dynamic caches with room: what anybody reads of them is what transformers' own would hold."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tests.doubles.tiny_models import model_of, tiny_plan, tokens_of
from was_kernels.runtime import growing_cache
from was_kernels.runtime.decode_model import DecodeModel
from was_kernels.runtime.growing_cache import GrowingLayer, make_room
from was_kernels.runtime.sparse_model import sparsify

GREEDY = {"do_sample": False, "disable_compile": True}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(length: int = 3) -> tuple[GrowingLayer, DynamicLayer]:
    """A layer with room and an ordinary one, of the same content."""
    first, second = DynamicCache(), DynamicCache()
    for cache in (first, second):
        cache.update(numbers(2, 3, length, 4), numbers(2, 3, length, 4) + 1, 0)
    assert make_room(first)
    return first.layers[0], second.layers[0]


def assert_same(growing: DynamicLayer, plain: DynamicLayer) -> None:
    assert torch.equal(growing.keys, plain.keys)
    assert torch.equal(growing.values, plain.values)
    assert growing.get_seq_length() == plain.get_seq_length()


def test_updates_are_written_in_place_until_the_room_ends(monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 4)
    growing, plain = pair()
    there = growing.keys.data_ptr()
    for n in (1, 2, 5):
        new = numbers(2, 3, n, 4)
        for layer in (growing, plain):
            layer.update(new, new + 2)
        assert_same(growing, plain)
    assert growing.room.length == int(growing.room.cumulative_length) == 11
    assert growing.keys.data_ptr() == there
    growing.update(numbers(2, 3, 64, 4), numbers(2, 3, 64, 4))  # more than there is room for
    assert growing.room is None and growing.get_seq_length() == 75


def test_a_full_room_is_followed_by_a_larger_one(monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 1)
    growing, plain = pair(64)
    for _ in range(80):
        new = numbers(2, 3, 1, 4)
        growing.make_room()
        assert not growing.room.full
        for layer in (growing, plain):
            layer.update(new, new)
    assert_same(growing, plain)


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "reset", "replace"])
def test_what_replaces_its_tensors_leaves_the_room(change):
    growing, plain = pair(6)
    for layer in (growing, plain):
        if change == "crop":
            layer.crop(-2)
        elif change == "reorder":
            layer.reorder_cache(torch.tensor([1, 0]))
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1]))
        elif change == "reset":
            layer.reset()
        else:
            layer.keys = layer.keys * 2
    if change != "reset":
        assert_same(growing, plain)
    new = numbers(*({"repeat": 4, "select": 1}.get(change, 2), 3, 1, 4))
    for layer in (growing, plain):
        layer.update(new, new)
    assert_same(growing, plain)


def test_a_copy_has_a_room_of_its_own():
    growing, plain = pair()
    other = copy.deepcopy(growing)
    other.update(numbers(2, 3, 1, 4), numbers(2, 3, 1, 4))
    assert_same(growing, plain)
    assert other.get_seq_length() == 4


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}])
def test_generate_writes_what_it_wrote(op_device, dtype, options, monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 1)
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(2, 60).to(op_device)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # padding on the left
    options = {**GREEDY, **options, "attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0}
    with sparsify(model, plan, backend="reference") as sparse:
        expected = sparse.generate(tokens, **options)
    with sparsify(model, plan, backend="cuda") as sparse:
        found = sparse.generate(tokens, **options)
    assert found.shape == expected.shape
    if op_device == "cpu":
        assert torch.equal(found, expected)


def test_a_cache_goes_on_after_the_plan(op_device, dtype):
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 12).to(op_device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        with sparsify(model, tiny_plan(model), backend="cuda"):
            model(tokens[:, :8], past_key_values=cache, use_cache=True)
            model(tokens[:, 8:9], past_key_values=cache, use_cache=True)
            held = copy.deepcopy(cache)
            steps = model(tokens[:, 9:11], past_key_values=held, use_cache=True).logits
        model(tokens[:, 9:10], past_key_values=cache, use_cache=True)  # dense
        dense = model(tokens[:, 10:], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 12 and held.get_seq_length() == 11
    assert dense.logits.isfinite().all() and steps.isfinite().all()


def test_caches_of_other_kinds_are_left_alone(op_device, dtype, monkeypatch):
    runs: list[int] = []
    monkeypatch.setattr(DecodeModel, "run", lambda self, given: runs.append(1))
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 9).to(op_device)
    with sparsify(model, tiny_plan(model), backend="cuda"), torch.inference_mode():
        model(tokens[:, :1], past_key_values=DynamicCache(config=model.config), use_cache=True)  # it is empty
        cache = DynamicCache(config=model.config)
        model(tokens[:, :8], past_key_values=cache, use_cache=True)
        cache.offloading = True
        monkeypatch.setattr(cache, "update", lambda k, v, layer, *_, **__: cache.layers[layer].update(k, v))
        model(tokens[:, 8:], past_key_values=cache, use_cache=True)
    assert not runs
    assert not any(isinstance(layer, GrowingLayer) for layer in cache.layers)
