"""Masked models beside the dense one, against distributions in float64 and evaluations of one model at a time."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from scipy.special import softmax

from was_search.coordinator.phases import shards
from was_search.masks import beside_dense, evaluation
from was_search.masks.beside_dense import distance, evaluate_beside_dense, joined
from was_search.masks.evaluation import evaluate_thresholds
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking

THRESHOLDS = np.full((3, 7), 0.6, np.float32)


def beside(masked, data, *thresholds):
    """Evaluations of the dense model and of each of ``thresholds``."""
    prefix = data.protocol.dense_prefix
    maskings = [Masking(masked, each, dense_prefix=prefix, count=True) for each in thresholds]
    return [joined([part]) for part in evaluate_beside_dense(masked, data, maskings)]


def in_float64(masked, tokens, predicted, thresholds=THRESHOLDS):
    """Flips and total variation of each sequence, over the whole vocabulary."""
    ids = torch.as_tensor(tokens)
    with torch.inference_mode():
        dense = masked.model(input_ids=ids).logits[:, -predicted - 1 : -1].double().numpy()
        with Masking(masked, thresholds):
            sparse = masked.model(input_ids=ids).logits[:, -predicted - 1 : -1].double().numpy()
    variation = 0.5 * np.abs(softmax(dense, axis=-1) - softmax(sparse, axis=-1)).sum(-1)
    return (dense.argmax(-1) != sparse.argmax(-1)).mean(1), variation.mean(1)


@pytest.mark.parametrize("stride", [5, 17])
def test_flips_and_variation_against_float64(masked, tokens, make_data, stride):
    _, found = beside(masked, make_data(tokens, stride=stride), THRESHOLDS)
    flips, variation = in_float64(masked, tokens, min(stride, 16))
    np.testing.assert_array_equal(found.distance.flips, flips)  # no two logits of this model are near each other
    # float32 probabilities, and another batch in the forward
    np.testing.assert_allclose(found.distance.variation, variation, rtol=1e-5)
    assert 0.1 < flips.mean() < 0.9 and 0.1 < variation.mean() < 0.9
    assert found.distance.to_json() == {
        "flip_rate": pytest.approx(flips.mean()),
        "total_variation": pytest.approx(variation.mean(), rel=1e-5),
    }


def test_half_precision_is_compared_in_float32(make_llama, tokens, make_data):
    masked = MaskedModel.of(make_llama(torch.bfloat16), "l2")
    _, found = beside(masked, make_data(tokens[:4]), THRESHOLDS)
    _, variation = in_float64(masked, tokens[:4], 16)
    np.testing.assert_allclose(found.distance.variation, variation, rtol=1e-5)  # of the same bfloat16 logits


def test_losses_and_sparsities_are_those_of_one_model_at_a_time(masked, tokens, make_data):
    data, other = make_data(tokens, dense_prefix=3), THRESHOLDS / 2
    found = beside(masked, data, THRESHOLDS, other)
    assert [one.distance is None for one in found] == [True, False, False]
    for one, thresholds in zip(found, (None, THRESHOLDS, other), strict=True):
        alone = evaluate_thresholds(masked, data, thresholds)
        np.testing.assert_array_equal(one.losses, alone.losses)
        np.testing.assert_array_equal(one.achieved, alone.achieved)
        assert (one.tokens, one.stopped_early) == (alone.tokens, False)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_cuts_at_whole_batches_leave_no_trace(masked, tokens, make_data, n):
    """Bit for bit, however many workers share the sequences."""
    data = make_data(tokens)
    whole = beside(masked, data, THRESHOLDS)
    parts = [
        evaluate_beside_dense(masked, shard, [Masking(masked, THRESHOLDS, dense_prefix=1, count=True)])
        for shard in shards(data, n)
    ]
    assert len(parts) == n
    for one, theirs in zip(whole, zip(*parts, strict=True), strict=True):
        found = joined(theirs)
        np.testing.assert_array_equal(found.losses, one.losses)
        np.testing.assert_array_equal(found.achieved, one.achieved)
        assert found.tokens == one.tokens
    np.testing.assert_array_equal(found.distance.flips, whole[1].distance.flips)
    np.testing.assert_array_equal(found.distance.variation, whole[1].distance.variation)


def test_masks_that_drop_nothing_change_nothing(masked, tokens, make_data):
    _, found = beside(masked, make_data(tokens), np.zeros((3, 7), np.float32))
    assert found.distance.to_json() == {"flip_rate": 0.0, "total_variation": 0.0}


def test_each_mask_has_its_own_scores_and_prefix(llama, masked, tokens, make_data):
    """As plans of one model that were made with other settings have."""
    other, data = MaskedModel.of(llama, "l1", "shared"), make_data(tokens)
    thresholds = other.shape.copied(THRESHOLDS)
    maskings = [
        Masking(masked, THRESHOLDS, dense_prefix=1, count=True),
        Masking(other, thresholds, dense_prefix=4, count=True),
    ]
    _, first, second = (joined([part]) for part in evaluate_beside_dense(masked, data, maskings))
    np.testing.assert_array_equal(first.losses, evaluate_thresholds(masked, data, THRESHOLDS).losses)
    alone = evaluate_thresholds(other, make_data(tokens, dense_prefix=4), thresholds)
    np.testing.assert_array_equal(second.losses, alone.losses)
    np.testing.assert_array_equal(second.achieved, alone.achieved)


def test_distance_at_its_ends():
    far = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0], [1.0, 1.0, 0.0]])
    flips, variation = distance(far, far.roll(1, dims=1))
    assert flips.tolist() == [True, True, True]
    assert variation[:2].tolist() == pytest.approx([1.0, 1.0])
    flips, variation = distance(far, far + 20.0)  # of equal logits the first counts, in both
    assert flips.tolist() == [False] * 3
    np.testing.assert_allclose(variation, 0.0, atol=1e-6)


def test_distance_in_pieces_is_the_same(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    dense, other = (torch.randn((40, 61), generator=draw) for _ in range(2))
    flips, variation = distance(dense, other)
    monkeypatch.setattr(evaluation, "_LOGIT_ELEMENTS", 2 * 61 * 7)  # seven rows at a time
    again = distance(dense, other)
    assert torch.equal(again[0], flips)
    # torch may sum rows of a matrix of another height in another order
    torch.testing.assert_close(again[1], variation, rtol=1e-6, atol=0.0)


def test_holds_two_batches_of_logits_at_most(masked, tokens, make_data, monkeypatch):
    """With a large vocabulary they are most of the memory."""
    made, most = [], []

    def watched(*given):
        logits = evaluation.predicted_logits(*given)
        made.append(weakref.ref(logits))
        most.append(sum(each() is not None for each in made))
        return logits

    monkeypatch.setattr(beside_dense, "predicted_logits", watched)
    beside(masked, make_data(tokens), THRESHOLDS, THRESHOLDS / 2)
    assert len(most) == 9 and max(most) == 2  # three batches, dense and under two masks


def test_what_is_not_a_number_is_reported(make_llama, tokens, make_data):
    model = make_llama()
    model.lm_head.weight[3, 3] = float("nan")
    masked = MaskedModel.of(model, "l2")
    dense, found = beside(masked, make_data(tokens), THRESHOLDS)
    assert np.isnan(dense.loss_nats) and np.isnan(found.loss_nats)
    assert np.isnan(found.distance.to_json()["total_variation"])
