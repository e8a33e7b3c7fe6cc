from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.was_search.masks.by_autograd import backward_through
from was_search.masks.calibration import histogram_pass
from was_search.masks.evaluation import evaluate_thresholds
from was_search.masks.masked_model import MaskedModel
from was_search.masks.slope import SlopeOracle, slope_pass
from was_search.masks.slope_point import _Mask, _Masked


@pytest.fixture
def masked(make_llama):
    return MaskedModel.of(make_llama(torch.float64), "l2")


@pytest.fixture
def histograms(masked, make_data, tokens):
    return histogram_pass(masked, make_data(tokens), None)[0]


def brute_force(masked, tokens, thresholds, low, high, prefix, predicted):
    """Sum over dropped-next channels of -g x by plain autograd: masked inputs as leaves, a sequence at a time."""
    changes = np.zeros(thresholds.shape)
    for sequence in tokens:
        inputs, leaves = {}, {}

        def hook(key, linear, x, out, inputs=inputs, leaves=leaves):
            score = x.detach().abs().float() * masked.norms[key[0]][key[1]]
            keep = score >= float(thresholds[key])
            keep[:, :prefix] = True
            left = x * keep
            left.retain_grad() if left.requires_grad else left.requires_grad_(True)
            inputs[key], leaves[key] = (x.detach(), score), left
            return F.linear(left, linear.weight)

        backward_through(masked, sequence, predicted, hook)
        for key, (x, score) in inputs.items():
            window = (score >= float(low[key])) & (score < float(high[key]))
            window[:, :prefix] = False
            changes[key] -= float((leaves[key].grad * x * window).sum())
    return changes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("prefix", "predicted"), [(1, 16), (0, 16), (3, 5)])
def test_slopes_without_a_band_against_autograd(masked, histograms, make_data, tokens, prefix, predicted, recompute):
    masked = dataclasses.replace(masked, recompute=recompute)
    data = make_data(tokens, dense_prefix=prefix, stride=predicted)
    point = np.random.default_rng(0).uniform(0.1, 0.9, (3, 7))
    found = slope_pass(masked, data, point, histograms, width=0.0, window=0.05)
    at = [histograms.thresholds(np.clip(point + off, 0, 0.99)) for off in (0.0, -0.05, 0.05)]
    expected = brute_force(masked, tokens, *at, prefix, predicted)
    # The weights are float64, products are taken in float32: 160 tokens x 24 channels of both signs.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.slopes * 10 * predicted * 0.1, expected, atol=1e-4 * scale)
    assert found.tokens == tokens.size
    # Scores before masking, each counted once whatever is recomputed.
    again = histogram_pass(masked, data, at[0])[0]
    np.testing.assert_array_equal(found.histograms.host().counts, again.counts)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in masked.model.modules())
    assert not any("forward" in vars(m) for m in masked.model.modules())


def test_the_loss_of_a_pass_is_that_of_an_evaluation(masked, histograms, tokens, make_data):
    data, point = make_data(tokens), np.full((3, 7), 0.5)
    found = slope_pass(masked, data, point, histograms)
    evaluation = evaluate_thresholds(masked, data, histograms.thresholds(point))
    assert found.nats == pytest.approx(evaluation.loss_nats, rel=1e-6)


def test_the_band_gives_the_derivative_of_a_masked_mean():
    """d/da mean f(m(a x)) by finite differences on many samples; plain autograd misses the channels that cross."""
    torch.manual_seed(0)
    x = torch.randn(1, 200_000, 8)
    norms = torch.linspace(0.5, 2.0, 8)
    threshold = torch.tensor(0.9)
    weights = torch.linspace(1.0, 3.0, 8)

    def mean(a):
        scaled = a * x
        return float((weights * torch.where(scaled.abs() * norms >= threshold, scaled, 0.0).abs()).sum(-1).mean())

    expected = (mean(1.02) - mean(0.98)) / 0.04

    def slope(width):
        a = torch.ones((), requires_grad=True)
        unused, counts = torch.zeros((), dtype=torch.float64), torch.zeros(1 << 15, dtype=torch.int64)
        limits = threshold.expand(3)
        out = _Masked.apply(a * x, norms, limits, _Mask(float(threshold), width, 0, unused, counts))
        # Where a channel is dropped its sign is still that of x: the derivative of the absolute value at a jump.
        loss = (weights * out * x.sign()).sum(-1).mean()
        return float(torch.autograd.grad(loss, a)[0])

    # 200,000 samples of eight channels: a finite difference is good to about 1 %, the band's density to a few.
    assert slope(0.3) == pytest.approx(expected, rel=0.05)
    assert slope(0.0) < 0.75 * expected


def test_an_oracle_uses_all_sequences_before_any_comes_again_and_repeats_itself(
    masked, histograms, make_data, tokens, monkeypatch
):
    seen = []

    def oracle():
        return SlopeOracle(masked, make_data(tokens), histograms, per_call=4, seed=3)

    import was_search.masks.slope as module

    real = module.slope_pass

    def recorded(model, part, *args, **kwargs):
        seen.append(part.tokens)
        return real(model, part, *args, **kwargs)

    monkeypatch.setattr(module, "slope_pass", recorded)
    first, point = oracle(), np.full((3, 7), 0.5)
    slopes = [first(point) for _ in range(5)]
    rows = [row.tobytes() for part in seen for row in part]
    assert len(set(rows[:10])) == len(set(rows[10:])) == 10
    assert first.tokens_seen == 5 * 4 * 17
    second = oracle()
    for wanted in slopes:
        np.testing.assert_array_equal(second(point), wanted)


@pytest.mark.slow(seconds=20)
def test_slopes_on_the_demo_checkpoint_predict_what_happens():
    """Central differences of the loss on the same tokens, a kind of projection at a time, at 60 %."""
    from was_search.checkpoints.load import load_model, load_tokenizer, resolve_model
    from was_search.service.steps.demonstration import DEMO_FOLDER
    from was_search.texts.splits import load_text
    from was_search.texts.tokens import tokenise

    source = resolve_model(str(DEMO_FOLDER / "model"))
    masked = MaskedModel.of(load_model(source, dtype="float32", device="cpu").requires_grad_(False), "l2")
    data = tokenise(
        load_text(str(DEMO_FOLDER / "text"), "calibration"),
        load_tokenizer(source),
        sequence_length=256,
        stride=256,
        n_sequences=24,
        dtype="float32",
        batch_size=8,
        dense_prefix=1,
        seed=0,
        at_most=True,
    )
    point = np.full((12, 7), 0.6)
    histograms = histogram_pass(masked, data, None)[0]
    for _ in range(3):
        thresholds = histograms.thresholds(point)
        histograms = histogram_pass(masked, data, thresholds)[0]

    def loss(sparsities):
        return evaluate_thresholds(masked, data, histograms.thresholds(sparsities)).loss_nats

    directions = [np.eye(7)[p] * np.ones((12, 1)) for p in range(7)]
    actual = [(loss(point + 0.04 * d) - loss(point - 0.04 * d)) / 2 for d in directions]
    predicted = {}
    for width in (0.0, 0.5):
        slopes = slope_pass(masked, data, point, histograms, width=width).slopes
        predicted[width] = [0.04 * float((slopes * d).sum()) for d in directions]
    # 6,000 tokens: single kinds are noisy. With the band the sum is right within a third, without it far too small.
    assert np.corrcoef(actual, predicted[0.5])[0, 1] > 0.9
    assert 0.65 < sum(predicted[0.5]) / sum(actual) < 1.5
    assert sum(predicted[0.0]) / sum(actual) < 0.6
