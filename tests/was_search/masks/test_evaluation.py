from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from was_search.errors import ConfigError, InfeasibleError
from was_search.masks import evaluation
from was_search.masks.calibration import histogram_pass
from was_search.masks.early_stop import StopRule
from was_search.masks.evaluation import dense_top, evaluate_thresholds, sequence_losses, sequence_nats
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking


def transformers_loss(model, sequence, predicted):
    """Mean nats of the last ``predicted`` tokens, by transformers' own loss: -100 is not predicted."""
    ids = torch.as_tensor(sequence)[None]
    labels = ids.clone()
    labels[:, :-predicted] = -100
    return float(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("stride", [1, 5, 16, 17])
def test_losses_against_transformers(llama, masked, tokens, make_data, stride):
    data = make_data(tokens, stride=stride)
    found = evaluate_thresholds(masked, data, None)
    predicted = min(stride, 16)
    with torch.inference_mode():
        expected = [transformers_loss(llama, sequence, predicted) for sequence in tokens]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)  # float32, one sequence a batch against four
    assert found.tokens == 10 * predicted
    assert found.loss_nats == pytest.approx(np.mean(expected), rel=1e-5)
    assert not found.stopped_early
    assert found.seconds > 0
    np.testing.assert_array_equal(found.achieved, np.zeros((3, 7)))


def test_masked_losses_against_transformers(llama, masked, tokens, make_data):
    thresholds = np.full((3, 7), 0.6, np.float32)
    found = evaluate_thresholds(masked, make_data(tokens), thresholds)
    with torch.inference_mode(), Masking(masked, thresholds):
        expected = [transformers_loss(llama, sequence, 16) for sequence in tokens]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    dense = evaluate_thresholds(masked, make_data(tokens), None)
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
def evaluate(masked, tokens, make_data):
    """``evaluate(sparsities, rule)`` on 40 sequences, with the dense model's histograms."""
    dense = histogram_pass(masked, make_data(tokens), None)[0]
    data = make_data(np.tile(tokens, (4, 1)))
    return lambda sparsities, rule=None: evaluate_thresholds(masked, data, dense.thresholds(sparsities), rule=rule)


def test_an_evaluation_is_repeatable(evaluate):
    sparsities = np.random.default_rng(0).uniform(0, 0.9, (3, 7))
    first, second = evaluate(sparsities), evaluate(sparsities)
    np.testing.assert_array_equal(first.losses, second.losses)
    np.testing.assert_array_equal(first.achieved, second.achieved)
    assert len(first.losses) == 40


def test_stops_between_batches_with_the_losses_so_far(evaluate):
    full = evaluate(np.full((3, 7), 0.5))
    stopped = evaluate(np.full((3, 7), 0.5), StopRule(full.losses - 1.0))
    assert stopped.stopped_early
    assert len(stopped.losses) == 8  # the first batch boundary with eight sequences
    assert stopped.tokens == 8 * 16
    np.testing.assert_array_equal(stopped.losses, full.losses[:8])


def test_does_not_stop_at_the_last_batch_or_when_better(evaluate):
    full = evaluate(np.full((3, 7), 0.5))
    assert not evaluate(np.full((3, 7), 0.5), StopRule(full.losses + 1.0)).stopped_early
    late = full.losses.copy()
    late[36:] -= 1.0  # worse on the last batch only
    assert not evaluate(np.full((3, 7), 0.5), StopRule(late)).stopped_early


def test_a_loss_that_is_not_a_number_is_reported(make_llama, tokens, make_data):
    model = make_llama()
    model.lm_head.weight[3, 3] = float("nan")
    found = evaluate_thresholds(MaskedModel.of(model, "l2"), make_data(tokens), None)
    assert np.isnan(found.loss_nats)


def test_refuses_a_sparsity_of_one(evaluate):
    with pytest.raises(InfeasibleError, match=r"sparsities: must be in \[0, 1\)"):
        evaluate(np.full((3, 7), 1.0))


THRESHOLDS = np.full((3, 7), 0.6, np.float32)


def full_divergence(masked, tokens, predicted):
    """KL(dense || masked) over the whole vocabulary, mean of the predicted tokens of each sequence, in float64."""
    ids = torch.as_tensor(tokens)
    with torch.inference_mode():
        dense = masked.model(input_ids=ids).logits[:, -predicted - 1 : -1].double().numpy()
        with Masking(masked, THRESHOLDS):
            sparse = masked.model(input_ids=ids).logits[:, -predicted - 1 : -1].double().numpy()
    p, q = (np.exp(log_softmax(x, axis=-1)) for x in (dense, sparse))
    return rel_entr(p, q).sum(-1).mean(1)


def with_top(masked, data, k, thresholds=THRESHOLDS):
    return evaluate_thresholds(masked, data, thresholds, top=dense_top(masked, data, k))


@pytest.mark.parametrize("stride", [5, 17])
def test_divergence_against_the_full_one(masked, tokens, make_data, stride):
    data = make_data(tokens, stride=stride)
    bound = full_divergence(masked, tokens, min(stride, 16))
    # float32 logits of order 1 and sums of at most 16 tokens
    np.testing.assert_allclose(with_top(masked, data, 61).losses, bound, rtol=1e-5, atol=1e-6)
    before = np.zeros(10)
    for k in (1, 4, 16, 40):
        found = with_top(masked, data, k).losses
        assert np.all((before < found) & (found < bound))
        before = found


def test_the_nll_comes_with_the_divergence(masked, tokens, make_data):
    data = make_data(tokens)
    plain = evaluate_thresholds(masked, data, THRESHOLDS)
    found = with_top(masked, data, 16)
    # the same logits; their logsumexp in another order, float32
    np.testing.assert_allclose(found.nats, plain.losses, rtol=1e-6)
    assert found.nll_nats() == pytest.approx(plain.nll_nats(), rel=1e-6)
    assert plain.nll_nats() == plain.loss_nats
    assert plain.nats is None
    assert plain.as_nll() is plain
    np.testing.assert_array_equal(found.as_nll().losses, found.nats)
    assert found.loss_nats < 0.9 * found.nll_nats()


def test_the_dense_models_own_divergence_is_zero(masked, tokens, make_data):
    for k in (8, 61):
        np.testing.assert_array_equal(with_top(masked, make_data(tokens), k, None).losses, 0.0)


def test_half_precision_divergence_is_taken_in_float32(make_llama, tokens, make_data):
    masked = MaskedModel.of(make_llama(torch.bfloat16), "l2")
    data = make_data(tokens[:4])
    found = with_top(masked, data, 61)
    # the full one of the same bfloat16 logits
    bound = full_divergence(masked, tokens[:4], 16)
    np.testing.assert_allclose(found.losses, bound, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(with_top(masked, data, 8, None).losses, 0.0)


def test_divergence_in_pieces_gives_the_same(masked, tokens, make_data, monkeypatch):
    whole = with_top(masked, make_data(tokens), 9)
    for elements in (2 * 61 * 7, 1):
        monkeypatch.setattr(evaluation, "_LOGIT_ELEMENTS", elements)
        found = with_top(masked, make_data(tokens), 9)
        # torch may sum rows of a matrix of another height in another order: float32, nats of order 1
        np.testing.assert_allclose(found.losses, whole.losses, atol=1e-6)
        np.testing.assert_allclose(found.nats, whole.nats, rtol=1e-6)


def test_divergence_has_a_gradient(make_llama, make_data, tokens):
    """Against a difference quotient in one weight; the model must not be at the dense point, where it vanishes."""
    model = make_llama()
    batch = torch.as_tensor(tokens[:2])
    top = dense_top(MaskedModel.of(model, "l2"), make_data(tokens[:2]), 16)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight += 0.1 * torch.sin(torch.arange(weight.numel(), dtype=torch.float32)).view_as(weight)
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(sequence_losses(model, batch, 16, top)[0].sum(), weight)
    i, j = divmod(int(gradient.abs().argmax()), weight.shape[1])

    def moved(step):
        with torch.no_grad():
            weight[i, j] += step
            value = float(sequence_losses(model, batch, 16, top)[0].double().sum())
            weight[i, j] -= step
        return value

    # float32 values of order 1 with a step of 1e-2: the quotient is good to about 1e-4 of the gradient's size
    quotient = (moved(1e-2) - moved(-1e-2)) / 2e-2
    assert float(gradient[i, j]) == pytest.approx(quotient, rel=1e-2)
    assert abs(quotient) > 0.01


def test_early_stopping_compares_divergences(masked, tokens, make_data):
    data = make_data(np.tile(tokens, (4, 1)))
    dense = histogram_pass(masked, make_data(tokens), None)[0]
    top = dense_top(masked, data, 16)

    def evaluate(sparsity, rule=None):
        return evaluate_thresholds(masked, data, dense.thresholds(np.full((3, 7), sparsity)), rule=rule, top=top)

    full = evaluate(0.5)
    # NLL of order 4 against divergences of order 1: an incumbent of NLL would never stop anything
    assert not evaluate(0.7, StopRule(full.nats)).stopped_early
    stopped = evaluate(0.7, StopRule(full.losses))
    assert stopped.stopped_early
    assert len(stopped.nats) == len(stopped.losses) < 40


def test_refuses_a_top_of_other_sequences_or_beyond_the_vocabulary(masked, tokens, make_data):
    top = dense_top(masked, make_data(tokens[:8]), 4)
    with pytest.raises(ValueError, match="top: must be of 10 x 16 tokens, got 8 x 16"):
        evaluate_thresholds(masked, make_data(tokens), None, top=top)
    with pytest.raises(ConfigError, match="kl_top_k: must be at most the vocabulary, 61 tokens, got 62"):
        dense_top(masked, make_data(tokens), 62)


def test_a_divergence_that_is_not_a_number_is_reported(make_llama, tokens, make_data):
    model = make_llama()
    masked, data = MaskedModel.of(model, "l2"), make_data(tokens)
    top = dense_top(masked, data, 8)
    model.lm_head.weight[3, 3] = float("nan")
    found = evaluate_thresholds(masked, data, None, top=top)
    assert np.isnan(found.loss_nats)
