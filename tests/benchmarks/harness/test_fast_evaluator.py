from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness import replays
from benchmarks.harness.fast_evaluator import FastEvaluator
from benchmarks.harness.replays import CHUNKS, chunks
from was_search.checkpoints.structure import find_structure
from was_search.masks.divergence import DenseTop
from was_search.masks.evaluation import dense_top, evaluate_thresholds
from was_search.masks.masked_model import MaskedModel

THRESHOLDS = np.random.default_rng(1).uniform(0.0, 1.0, (3, 7)).astype(np.float32)
THRESHOLDS[0, 3] = 0.0


def evaluated(model, data, thresholds, top=None):
    return evaluate_thresholds(MaskedModel.of(model, "l2"), data, thresholds, top=top)


def reference(model, data, thresholds):
    return evaluated(model, data, thresholds).losses


def top_of(model, data) -> DenseTop:
    return dense_top(MaskedModel.of(model, "l2"), data, 7)


def fast(model, data, **options) -> FastEvaluator:
    return FastEvaluator(MaskedModel.of(model, "l2"), data, **options)


@pytest.mark.parametrize("thresholds", [THRESHOLDS, np.zeros((3, 7), np.float32), THRESHOLDS * 3])
def test_losses_are_those_of_the_reference(make_llama, token_set, thresholds):
    """float32 in other batches, with another attention kernel: 1e-5 of losses of about 5 nats."""
    expected = reference(make_llama(), token_set, thresholds)
    evaluator = fast(make_llama(), token_set)
    np.testing.assert_allclose(evaluator.losses(thresholds), expected, atol=1e-5)
    assert not evaluator.graphs
    if thresholds.any():
        assert np.abs(expected - reference(make_llama(), token_set, None)).min() > 1e-3


@pytest.mark.parametrize("chosen", [[5], [74, 0, 3], list(range(70, 30, -1)), list(range(75))])
def test_any_sequences_in_any_order(make_llama, token_set, chosen):
    expected = reference(make_llama(), token_set, THRESHOLDS)
    found = fast(make_llama(), token_set).losses(THRESHOLDS, np.array(chosen))
    np.testing.assert_allclose(found, expected[chosen], atol=1e-5)


def test_each_sequence_under_thresholds_of_its_own(make_llama, token_set):
    chosen = np.array([3, 3, 70, 12, 3])
    factors = [1.0, 0.0, 2.0, 0.5, 3.0]
    found = fast(make_llama(), token_set).losses(np.stack([THRESHOLDS * np.float32(f) for f in factors]), chosen)
    model = make_llama()
    expected = [
        reference(model, token_set, THRESHOLDS * np.float32(f))[i] for f, i in zip(factors, chosen, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_dropped_is_counted(make_llama, token_set):
    """No channel may differ: both compare the same float32 scores."""
    _, dropped = fast(make_llama(), token_set).evaluate(THRESHOLDS)
    expected = evaluated(make_llama(), token_set, THRESHOLDS)
    structure = find_structure(make_llama())
    channels = np.asarray(structure.shape.in_features) * (17 - 2)
    np.testing.assert_allclose(dropped.mean(axis=0) / channels, expected.achieved, atol=1e-4)
    assert dropped[:, 0, 3].max() == 0


@pytest.mark.parametrize("chosen", [[5], list(range(70, 30, -1)), list(range(75))])
def test_divergence_from_the_dense_model(make_llama, token_set, chosen):
    model = make_llama()
    top = top_of(model, token_set)
    expected = evaluated(model, token_set, THRESHOLDS, top).losses
    evaluator = fast(make_llama(), token_set, top=top)
    np.testing.assert_allclose(evaluator.losses(THRESHOLDS, np.array(chosen)), expected[chosen], atol=1e-5)
    assert np.abs(evaluator.losses(THRESHOLDS * 0)).max() < 1e-5


def test_long_sequences_are_evaluated_in_smaller_chunks(make_llama, token_set, monkeypatch):
    assert (chunks(256), chunks(1024), chunks(8192)) == (CHUNKS, (16, 8), (8,))
    expected = reference(make_llama(), token_set, THRESHOLDS)
    monkeypatch.setattr(replays, "MOST_TOKENS", 17 * 16)
    seen = []
    evaluator = fast(make_llama(), token_set)
    monkeypatch.setattr(evaluator._replays, "_forward", lambda i, t: seen.append(len(i)) or evaluator._forward(i, t))
    np.testing.assert_allclose(evaluator.losses(THRESHOLDS), expected, atol=1e-5)
    assert seen == [16, 16, 16, 16, 8, 8]  # 75 filled up to 80


def test_no_sequences(make_llama, token_set):
    assert fast(make_llama(), token_set).losses(THRESHOLDS, np.zeros(0, np.int64)).shape == (0,)


def test_the_model_keeps_no_hooks(make_llama, token_set):
    """What evaluates the same model afterwards sees it unmasked."""
    model = make_llama()
    expected = reference(make_llama(), token_set, None)
    fast(model, token_set).losses(THRESHOLDS)
    np.testing.assert_allclose(reference(model, token_set, None), expected, atol=1e-5)


def test_a_sliding_window_keeps_its_mask(token_set):
    """Mistral's window binds here, so the model's own attention stays."""
    from transformers import MistralConfig, MistralForCausalLM

    def make(window):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.25,
            sliding_window=window,
        )
        return MistralForCausalLM(config).eval().requires_grad_(False)

    for window in (4, 17, None):
        expected = reference(make(window), token_set, THRESHOLDS)
        np.testing.assert_allclose(fast(make(window), token_set).losses(THRESHOLDS), expected, atol=1e-5)
    assert np.abs(reference(make(4), token_set, THRESHOLDS) - expected).max() > 1e-3


def test_a_capture_that_fails_is_told_once_and_done_without(make_llama, token_set, monkeypatch):
    def refuse():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    evaluator = fast(make_llama(), token_set, graphs=True)
    with pytest.warns(UserWarning, match="no CUDA graph could be captured.*operation not permitted") as told:
        found = evaluator.losses(THRESHOLDS)
    assert len(told) == 1
    assert not evaluator.graphs
    np.testing.assert_allclose(found, reference(make_llama(), token_set, THRESHOLDS), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu(make_llama, token_set):
    """Replays follow the thresholds; captured without a warning, at every chunk size."""
    evaluator = fast(make_llama().cuda(), token_set)
    model = make_llama().cuda()
    for thresholds in (THRESHOLDS, np.zeros((3, 7), np.float32), THRESHOLDS * 2):
        expected = reference(model, token_set, thresholds)
        for n in (75, 32, 16, 8, 3):
            found = evaluator.losses(thresholds, np.arange(n))
            # float32 without TF32, other kernels: 1e-4 of losses of about 5 nats
            np.testing.assert_allclose(found, expected[:n], atol=1e-4)
    top = top_of(model, token_set)
    divergences = fast(make_llama().cuda(), token_set, top=top)
    expected = evaluated(model, token_set, THRESHOLDS, top).losses
    np.testing.assert_allclose(divergences.losses(THRESHOLDS), expected, atol=1e-4)
    assert divergences.graphs
    assert evaluator.graphs
    assert evaluator._replays.sizes == [8, 16, 32, 64]
