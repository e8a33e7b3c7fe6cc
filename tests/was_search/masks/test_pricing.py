from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.was_search.masks.by_autograd import backward_through
from was_search.masks.calibration import histogram_pass
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.masks.pricing import DEFAULT_GRID, price_sums

GRID = np.array([0.0, 0.2, 0.5, 0.9])


def level_thresholds(model, data):
    dense = histogram_pass(model, data, None)[0]
    shape = (len(model.structure.blocks), 7)
    return np.stack([dense.thresholds(np.full(shape, level)) for level in GRID], axis=-1)


def brute_force(masked, tokens, thresholds, prefix, predicted):
    """Every sequence alone, every level by masking the input and multiplying it out; g by autograd."""
    sums = np.zeros(thresholds.shape)
    for sequence in tokens:
        inputs, outputs = {}, {}

        def hook(key, linear, x, out, inputs=inputs, outputs=outputs):
            inputs[key] = x.detach()
            out = out.detach().requires_grad_(True) if not out.requires_grad else out
            out.retain_grad()
            outputs[key] = out
            return out

        backward_through(masked, sequence, predicted, hook)
        for (b, p), x in inputs.items():
            linear = masked.structure.linears()[7 * b + p][2]
            g = outputs[b, p].grad[0]
            score = x[0].abs().float() * masked.norms[b][p]
            for level in range(thresholds.shape[-1]):
                kept = torch.where(score >= float(thresholds[b, p, level]), x[0], torch.zeros_like(x[0]))
                change = F.linear(kept, linear.weight) - F.linear(x[0], linear.weight)
                per_token = 0.5 * (g * change).sum(-1) ** 2
                sums[b, p, level] += float(per_token[prefix:].sum())
    return sums


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("prefix", "predicted"), [(1, 16), (0, 16), (3, 5)])
def test_prices_against_brute_force(make_llama, make_data, tokens, dtype, prefix, predicted, recompute):
    masked = MaskedModel.of(make_llama(dtype), "l2", recompute=recompute)
    thresholds = level_thresholds(masked, make_data(tokens, dense_prefix=0))
    sums, n_tokens = price_sums(masked, make_data(tokens, dense_prefix=prefix, stride=predicted), thresholds)
    assert n_tokens == 10 * (17 - prefix)
    expected = brute_force(masked, tokens, thresholds, prefix, predicted)
    assert np.all(expected[..., 1:] > 0)
    assert not sums[..., 0].any()
    # g . dy is summed in float32 over at most 24 channels with cancellation, then squared: a relative error
    # of 1e-3 on the sum over 160 tokens covers it; in float32 the backward pass adds its own rounding.
    np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-7 * expected.max())


def test_shards_add_up_whatever_the_batch(masked, make_data, tokens):
    thresholds = level_thresholds(masked, make_data(tokens, dense_prefix=0))
    run = lambda part, size: price_sums(masked, make_data(part, batch_size=size), thresholds)  # noqa: E731
    whole, n = run(tokens, 10)
    parts = [run(tokens[:3], 2), run(tokens[3:], 5)]
    assert sum(part[1] for part in parts) == n
    np.testing.assert_allclose(sum(part[0] for part in parts), whole, rtol=1e-3)  # as above: float32, other batches


def test_a_masked_prefix_costs_nothing(masked, make_data, tokens):
    thresholds = level_thresholds(masked, make_data(tokens, dense_prefix=0))
    sums = [price_sums(masked, make_data(tokens, batch_size=5, dense_prefix=k), thresholds)[0] for k in (0, 4, 16)]
    assert np.all(sums[0] >= sums[1])
    assert np.all(sums[1] >= sums[2])


def test_leaves_no_gradients_and_no_hooks(make_llama, make_data, tokens):
    model = make_llama().requires_grad_(True)
    masked = MaskedModel.of(model, "l2")
    thresholds = level_thresholds(masked, make_data(tokens, dense_prefix=0))
    sums, _ = price_sums(masked, make_data(tokens, batch_size=5), thresholds)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_pre_hooks or m._backward_hooks or m._forward_hooks for m in model.modules())
    model.requires_grad_(False)
    again, _ = price_sums(masked, make_data(tokens, batch_size=5), thresholds)
    np.testing.assert_array_equal(sums, again)


def test_prices_predict_the_loss_of_small_sparsities(make_llama, make_data, tokens):
    """What the price is for: it ranks projections as the KL of masking each alone does."""
    model = make_llama(torch.float64)
    masked = MaskedModel.of(model, "l2")
    thresholds = level_thresholds(masked, make_data(tokens, dense_prefix=0))[..., :2]
    # Own samples of the model make the gradient's second moment the Fisher information.
    torch.manual_seed(3)
    ids = torch.randint(0, 61, (200, 1))
    with torch.inference_mode():
        for _ in range(12):
            probabilities = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    sampled = ids.numpy()
    sums, n = price_sums(masked, make_data(sampled, batch_size=50), thresholds)
    divergence = np.zeros((3, 7))
    with torch.inference_mode():
        dense = model(input_ids=ids).logits.log_softmax(-1)
        for b in range(3):
            for p in range(7):
                alone = np.zeros((3, 7), np.float32)
                alone[b, p] = thresholds[b, p, 1]
                with Masking(masked, alone):
                    sparse = model(input_ids=ids).logits.log_softmax(-1)
                divergence[b, p] = float((dense.exp() * (dense - sparse))[:, :-1].sum()) / n
    rank = lambda v: np.argsort(np.argsort(v.ravel()))  # noqa: E731
    correlation = np.corrcoef(rank(sums[..., 1]), rank(divergence))[0, 1]
    assert correlation > 0.8  # an approximation by design: second order, tokens taken as independent


def test_the_default_grid():
    assert len(DEFAULT_GRID) == 39
    assert DEFAULT_GRID[0] == 0.0
    assert DEFAULT_GRID[-1] == 0.95
    np.testing.assert_allclose(np.diff(DEFAULT_GRID), 0.025, atol=1e-12)
