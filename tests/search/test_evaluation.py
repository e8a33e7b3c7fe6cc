from __future__ import annotations

import numpy as np
import pytest
import torch

from was_search import evaluation
from was_search.calibration import histogram_pass
from was_search.errors import InfeasibleError
from was_search.evaluation import ModelEvaluator, evaluate_thresholds, sequence_nats
from was_search.masking import Masking, structure_norms


def transformers_loss(model, sequence, predicted):
    """Mean nats of the last ``predicted`` tokens, by transformers' own loss: -100 is not predicted."""
    ids = torch.as_tensor(sequence)[None]
    labels = ids.clone()
    labels[:, :-predicted] = -100
    return float(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("stride", [1, 5, 16, 17])
def test_losses_against_transformers(llama, structure, tokens, make_data, stride):
    data = make_data(tokens, stride=stride)
    found = evaluate_thresholds(llama, structure, structure_norms(structure, "l2"), data, None)
    predicted = min(stride, 16)
    with torch.inference_mode():
        expected = [transformers_loss(llama, sequence, predicted) for sequence in tokens]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)  # float32, one sequence a batch against four
    assert found.tokens == 10 * predicted
    assert found.loss_nats == pytest.approx(np.mean(expected), rel=1e-5)
    assert not found.stopped_early
    assert found.seconds > 0
    np.testing.assert_array_equal(found.achieved, np.zeros((3, 7)))


def test_masked_losses_against_transformers(llama, structure, tokens, make_data):
    norms = structure_norms(structure, "l2")
    thresholds = np.full((3, 7), 0.6, np.float32)
    found = evaluate_thresholds(llama, structure, norms, make_data(tokens), thresholds)
    with torch.inference_mode(), Masking(structure, norms, thresholds):
        expected = [transformers_loss(llama, sequence, 16) for sequence in tokens]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    dense = evaluate_thresholds(llama, structure, norms, make_data(tokens), None)
    assert np.abs(found.losses - dense.losses).min() > 1e-3
    assert np.all(found.achieved > 0)


def test_logits_in_pieces_give_the_same(llama, tokens, monkeypatch):
    batch = torch.as_tensor(tokens[:4])
    with torch.inference_mode():
        whole = sequence_nats(llama, batch, 16)
        monkeypatch.setattr(evaluation, "_LOGIT_ELEMENTS", 61 * 7)  # seven rows at a time, 64 rows
        assert torch.equal(sequence_nats(llama, batch, 16), whole)
        monkeypatch.setattr(evaluation, "_LOGIT_ELEMENTS", 1)  # at least one row
        assert torch.equal(sequence_nats(llama, batch, 16), whole)


def test_half_precision_losses_are_summed_in_float32(make_llama, tokens):
    model = make_llama(torch.bfloat16)
    with torch.inference_mode():
        found = sequence_nats(model, torch.as_tensor(tokens[:2]), 16)
        logits = model(input_ids=torch.as_tensor(tokens[:2])).logits.double()
    expected = -logits[:, :-1].log_softmax(-1).gather(2, torch.as_tensor(tokens[:2, 1:, None])).sum((1, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.fixture
def evaluator(llama, structure, tokens, make_data):
    norms = structure_norms(structure, "l2")
    dense = histogram_pass(llama, structure, norms, tokens, None, batch_size=4, dense_prefix=1)[0]
    return ModelEvaluator(llama, structure, norms, make_data(np.tile(tokens, (4, 1))), dense)


def test_an_evaluation_is_repeatable(evaluator):
    sparsities = np.random.default_rng(0).uniform(0, 0.9, (3, 7))
    first, second = evaluator.evaluate(sparsities), evaluator.evaluate(sparsities)
    np.testing.assert_array_equal(first.losses, second.losses)
    np.testing.assert_array_equal(first.achieved, second.achieved)
    assert len(first.losses) == 40


def test_stops_between_batches_with_the_losses_so_far(evaluator):
    full = evaluator.evaluate(np.full((3, 7), 0.5))
    stopped = evaluator.evaluate(np.full((3, 7), 0.5), full.losses - 1.0)
    assert stopped.stopped_early
    assert len(stopped.losses) == 8  # the first batch boundary with eight sequences
    assert stopped.tokens == 8 * 16
    np.testing.assert_array_equal(stopped.losses, full.losses[:8])


def test_does_not_stop_at_the_last_batch_or_when_better(evaluator):
    full = evaluator.evaluate(np.full((3, 7), 0.5))
    assert not evaluator.evaluate(np.full((3, 7), 0.5), full.losses + 1.0).stopped_early
    late = full.losses.copy()
    late[36:] -= 1.0  # worse on the last batch only
    assert not evaluator.evaluate(np.full((3, 7), 0.5), late).stopped_early


def test_a_loss_that_is_not_a_number_is_reported(make_llama, structure, tokens, make_data):
    from was_search.structure import find_structure

    model = make_llama()
    model.lm_head.weight[3, 3] = float("nan")
    found = evaluate_thresholds(model, find_structure(model), structure_norms(structure, "l2"), make_data(tokens), None)
    assert np.isnan(found.loss_nats)


def test_refuses_a_sparsity_of_one(evaluator):
    with pytest.raises(InfeasibleError, match=r"sparsities: must be in \[0, 1\)"):
        evaluator.evaluate(np.full((3, 7), 1.0))


def test_an_evaluation_in_pieces_gives_the_same_losses(llama, structure, tokens, make_data):
    norms = structure_norms(structure, "l2")
    thresholds = np.full((3, 7), 0.6, np.float32)
    data = make_data(tokens)
    whole = evaluate_thresholds(llama, structure, norms, data, thresholds)
    first = evaluate_thresholds(llama, structure, norms, data, thresholds, until=3)
    assert len(first.losses) == 4  # rounded up to a whole batch
    second = evaluate_thresholds(llama, structure, norms, data, thresholds, before=first.losses)
    np.testing.assert_allclose(second.losses, whole.losses, rtol=1e-15)  # known means are multiplied and divided again
    assert first.tokens + second.tokens == whole.tokens
    with pytest.raises(ValueError, match="whole number of batches of 4 is needed, got 3"):
        evaluate_thresholds(llama, structure, norms, data, thresholds, before=first.losses[:3])
