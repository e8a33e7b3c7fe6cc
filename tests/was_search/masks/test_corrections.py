"""Corrected outputs and their gradient, against the same written out here in float64 with plain autograd."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.doubles.tiny_models import tiny_model
from tests.was_search.masks.by_autograd import backward_through
from was_search.compensation import Compensation
from was_search.masks.calibration import histogram_pass
from was_search.masks.corrections import LearnedCorrections
from was_search.masks.evaluation import dense_top, evaluate_thresholds
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.masks.slope import slope_pass


def drawn(shape, seed: int = 0) -> Compensation:
    flat = Compensation.none(shape).flat()
    return Compensation.from_flat(
        shape, flat + np.random.default_rng(seed).normal(0, 0.2, flat.size).astype(np.float32)
    )


@pytest.fixture
def masked(make_llama):
    return MaskedModel.of(make_llama(torch.float64), "l2")


@pytest.fixture
def histograms(masked, make_data, tokens):
    return histogram_pass(masked, make_data(tokens), None)[0]


SPARSITIES = np.full((3, 7), 0.5)
SPARSITIES[1, 4] = 0.0  # drops nothing, and is corrected all the same


@pytest.fixture
def thresholds(histograms):
    return histograms.thresholds(SPARSITIES)


def gradient(masked, data, histograms, compensation, top=None, sparsities=SPARSITIES):
    learned = LearnedCorrections(masked.structure)
    learned.start(compensation.flat())
    found = slope_pass(masked, data, sparsities, histograms, width=0.0, learned=learned, top=top)
    return learned.gradient(), found.nats


def by_hand(masked, sequence, thresholds, compensation, prefix, predicted, leaves):
    """Summed nats of one sequence with outputs as the compensation defines them; ``leaves`` take its gradients."""

    def hook(key, linear, x, _):
        b, p = key
        keep = x.detach().abs() * masked.norms[b][p] >= float(thresholds[key])
        keep[:, :prefix] = True
        if key not in leaves:
            leaves[key] = [
                torch.tensor(rows[b][p], dtype=torch.float64, requires_grad=True)
                for rows in (compensation.scales, compensation.constants)
            ]
        scale, constant = leaves[key]
        sparse = scale * F.linear(x * keep, linear.weight, linear.bias) + constant
        return torch.cat([F.linear(x, linear.weight, linear.bias)[:, :prefix], sparse[:, prefix:]], dim=1)

    backward_through(masked, sequence, predicted, hook)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("prefix", "predicted"), [(1, 16), (0, 16), (3, 5)])
def test_gradient_against_autograd(masked, histograms, thresholds, make_data, tokens, prefix, predicted, recompute):
    data = make_data(tokens, dense_prefix=prefix, stride=predicted)
    compensation, leaves = drawn(masked.shape), {}
    for sequence in tokens:
        by_hand(masked, sequence, thresholds, compensation, prefix, predicted, leaves)
    found, nats = gradient(dataclasses.replace(masked, recompute=recompute), data, histograms, compensation)
    expected = np.concatenate([leaves[key][kind].grad.numpy() for kind in range(2) for key in sorted(leaves)])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    losses = evaluate_thresholds(masked.compensated(compensation), data, thresholds)
    assert nats == pytest.approx(losses.loss_nats, rel=1e-6)


def test_gradient_of_the_divergence_is_its_slope(masked, histograms, make_data, tokens):
    data, nothing = make_data(tokens), np.zeros((3, 7))  # no channel crosses a threshold between two points
    top = dense_top(masked, data, 20)
    at, direction = drawn(masked.shape).flat(), drawn(masked.shape, 1).flat() - 1.0

    def there(step: float) -> tuple[np.ndarray, float]:
        point = Compensation.from_flat(masked.shape, at + np.float32(step) * direction)
        return gradient(masked, data, histograms, point, top, nothing)

    n = len(tokens) * data.protocol.predicted_per_sequence
    expected = (there(1e-3)[1] - there(-1e-3)[1]) / 2e-3
    assert float(there(0.0)[0] @ direction) / n == pytest.approx(expected, rel=1e-3)


def test_none_and_the_neutral_one_change_nothing(masked, thresholds, make_data, tokens):
    data = make_data(tokens)
    plain = evaluate_thresholds(masked, data, thresholds)
    neutral = evaluate_thresholds(masked.compensated(Compensation.none(masked.shape)), data, thresholds)
    np.testing.assert_array_equal(plain.losses, neutral.losses)
    again = evaluate_thresholds(masked.compensated(drawn(masked.shape)).compensated(None), data, thresholds)
    np.testing.assert_array_equal(plain.losses, again.losses)


def test_the_dense_model_is_never_corrected(masked, make_data, tokens):
    data, other = make_data(tokens), masked.compensated(drawn(masked.shape))
    np.testing.assert_array_equal(
        evaluate_thresholds(masked, data, None).losses, evaluate_thresholds(other, data, None).losses
    )
    prefix = data.protocol.sequence_length - 1
    everything = make_data(tokens, dense_prefix=prefix)
    nothing = np.zeros((3, 7), np.float32)
    at_last = evaluate_thresholds(other, everything, nothing), evaluate_thresholds(masked, everything, nothing)
    np.testing.assert_array_equal(*(found.losses for found in at_last))


def test_a_fused_map_is_corrected_like_its_parts():
    masked = MaskedModel.of(tiny_model("phi3"), "l2", "shared")
    compensation = drawn(masked.shape)
    seen = {}
    block = masked.structure.blocks[1]
    fused = block.fused[(0, 1, 2)]
    handle = fused.register_forward_hook(lambda _, args, y: seen.setdefault("plain", y.clone()))
    ids = torch.arange(6)[None]
    zeros = np.zeros(masked.shape.params.shape, np.float32)
    with torch.inference_mode(), Masking(masked.compensated(compensation), zeros, dense_prefix=2):
        late = fused.register_forward_hook(lambda _, args, y: seen.setdefault("corrected", y.clone()))
        masked.model(input_ids=ids)
    handle.remove()
    late.remove()
    scale, constant = (
        torch.tensor(np.concatenate([rows[1][p] for p in range(3)]), dtype=torch.float64)
        for rows in (compensation.scales, compensation.constants)
    )
    torch.testing.assert_close(seen["corrected"][:, 2:], scale * seen["plain"][:, 2:] + constant)
    torch.testing.assert_close(seen["corrected"][:, :2], seen["plain"][:, :2])
