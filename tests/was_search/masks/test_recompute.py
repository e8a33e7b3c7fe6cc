"""When blocks are recomputed in a backward pass, and that it changes no number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.doubles.tiny_models import tiny_model
from was_search.masks import recompute
from was_search.masks.calibration import histogram_pass
from was_search.masks.masked_model import MaskedModel
from was_search.masks.recompute import activations_fit
from was_search.masks.slope import slope_pass


@pytest.fixture
def masked():
    return MaskedModel.of(tiny_model("llama", torch.float32), "l2", recompute=True)


def slopes(masked, data):
    """Slopes at 60 %, and how often each block's attention ran."""
    calls = [0] * len(masked.structure.blocks)

    def counter(number):
        def count(*_):
            calls[number] += 1

        return count

    modules = [block.module.self_attn for block in masked.structure.blocks]
    handles = [module.register_forward_pre_hook(counter(number)) for number, module in enumerate(modules)]
    histograms = histogram_pass(masked, data, None)[0]
    calls[:] = [0] * len(calls)
    found = slope_pass(masked, data, np.full((len(calls), 7), 0.6), histograms)
    for handle in handles:
        handle.remove()
    return found, calls


def test_blocks_run_once_where_their_activations_find_room(masked, make_data, tokens, monkeypatch):
    data = make_data(tokens)
    batches = len(list(masked.batches(data)))
    short, calls = slopes(masked, data)
    assert calls == [2 * batches] * len(calls)
    monkeypatch.setattr(recompute, "_free_bytes", lambda device: 1 << 40)
    roomy, calls = slopes(masked, data)
    assert calls == [batches] * len(calls)
    np.testing.assert_array_equal(roomy.slopes, short.slopes)
    np.testing.assert_array_equal(roomy.histograms.host().counts, short.histograms.host().counts)
    assert roomy.nats == short.nats


def test_a_quarter_of_the_free_memory_is_the_limit(masked, monkeypatch):
    shape = masked.shape
    values = [
        8 * (sum(read) + sum(out)) + 24 * read[0]
        for read, out in zip(shape.in_features, shape.out_features, strict=True)
    ]
    monkeypatch.setattr(recompute, "_free_bytes", lambda device: 4 * 100 * sum(values))
    assert activations_fit(masked.model, masked.structure, 100)
    assert not activations_fit(masked.model, masked.structure, 101)


def test_attention_that_holds_its_scores_never_fits(masked, monkeypatch):
    monkeypatch.setattr(recompute, "_free_bytes", lambda device: 1 << 40)
    assert activations_fit(masked.model, masked.structure, 1)
    masked.model.set_attn_implementation("eager")
    assert not activations_fit(masked.model, masked.structure, 1)


def test_a_cpu_has_no_room():
    assert recompute._free_bytes(torch.device("cpu")) == 0
