from __future__ import annotations

import numpy as np
import pytest
import torch

from was_search.masks.calibration import histogram_pass, operating_point
from was_search.masks.evaluation import evaluate_thresholds
from was_search.masks.histogram import Histograms, bin_counts
from was_search.shape import ModelShape

SHAPE = ModelShape(((10,) * 7,) * 2, ((10,) * 7,) * 2)


class FakeModel:
    """Fourteen projections in a row; what reaches one shrinks with what the ones before it dropped."""

    def __init__(self, coupling: float = 0.6) -> None:
        rng = np.random.default_rng(0)
        self.base = rng.exponential(1.0, (14, 20_000)).astype(np.float32)
        self.coupling = coupling
        self.asked: list[np.ndarray | None] = []

    def __call__(self, thresholds):
        self.asked.append(thresholds)
        flat = np.zeros(14, np.float32) if thresholds is None else np.asarray(thresholds).ravel()
        achieved, counts = np.zeros(14), []
        for i in range(14):
            scale = np.float32(1.0 - self.coupling * achieved[:i].sum() / 14)
            scores = self.base[i] * scale
            achieved[i] = np.mean(scores < flat[i])
            counts.append(bin_counts(torch.from_numpy(scores)).numpy())
        return Histograms(np.array(counts).reshape(2, 7, -1)), achieved.reshape(2, 7)


def test_converges_where_one_pass_overshoots():
    model = FakeModel()
    dense, _ = model(None)
    wanted = np.full((2, 7), 0.6)
    _, first = model(dense.thresholds(wanted))
    assert SHAPE.sparsity(first) > 0.65  # the drift that this is about
    model.asked.clear()
    histograms, thresholds, achieved, passes = operating_point(model, dense, wanted, SHAPE, max_passes=20)
    assert abs(SHAPE.sparsity(achieved) - 0.6) <= 5e-4
    assert np.abs(achieved - wanted).max() <= 5e-3
    assert len(model.asked) == passes < 15  # one projection settles a pass at the latest
    # What is returned belongs together: the thresholds in force gave these histograms and figures.
    np.testing.assert_array_equal(thresholds, model.asked[-1])
    again, counted = FakeModel()(thresholds)
    np.testing.assert_array_equal(again.counts, histograms.counts)
    np.testing.assert_array_equal(counted, achieved)


def test_zero_and_uneven_sparsities():
    model = FakeModel()
    dense, _ = model(None)
    wanted = np.linspace(0.0, 0.9, 14).reshape(2, 7)
    _, thresholds, achieved, _ = operating_point(model, dense, wanted, SHAPE, max_passes=20)
    assert thresholds[0, 0] == 0.0
    assert achieved[0, 0] == 0.0
    assert np.abs(achieved - wanted).max() <= 5e-3


def test_a_model_without_drift_takes_one_pass():
    model = FakeModel(coupling=0.0)
    dense, _ = model(None)
    assert operating_point(model, dense, np.full((2, 7), 0.6), SHAPE)[3] == 1


def test_gives_up_with_the_last_result():
    model = FakeModel()
    dense, _ = model(None)
    model.asked.clear()
    _, thresholds, achieved, passes = operating_point(
        model, dense, np.full((2, 7), 0.6), SHAPE, tolerance=0.0, max_passes=3
    )
    assert passes == len(model.asked) == 3
    np.testing.assert_array_equal(thresholds, model.asked[-1])
    np.testing.assert_array_equal(achieved, FakeModel()(thresholds)[1])


def test_dense_histograms_against_the_inputs_themselves(llama, structure, masked, make_data, tokens):
    inputs = {}
    handles = [
        linear.register_forward_pre_hook(lambda _m, args, key=(b, p): inputs.setdefault(key, args[0]))
        for b, p, linear in structure.linears()
    ]
    with torch.inference_mode():
        llama(input_ids=torch.as_tensor(tokens))
    for handle in handles:
        handle.remove()
    histograms, seen, dropped = histogram_pass(masked, make_data(tokens, batch_size=len(tokens)), None)
    for (b, p), x in inputs.items():
        scores = x[:, 1:].abs() * masked.norms[b][p]
        np.testing.assert_array_equal(histograms.counts[b, p], bin_counts(scores).numpy())
        assert seen[b, p] == scores.numel() == 10 * 16 * x.shape[-1]
    assert not dropped.any()


def test_shards_of_whole_batches_add_up(masked, make_data, tokens):
    data, thresholds = make_data(tokens), np.full((3, 7), 0.4, np.float32)
    whole, *parts = (
        histogram_pass(masked, data.part(rows), thresholds) for rows in (slice(None), slice(4), slice(4, None))
    )
    np.testing.assert_array_equal(whole[0].counts, (parts[0][0] + parts[1][0]).counts)
    for i in (1, 2):
        np.testing.assert_array_equal(whole[i], parts[0][i] + parts[1][i])


def test_a_tiny_model_meets_its_nominal_sparsity(masked, tokens, make_data):
    data, shape = make_data(tokens), masked.shape

    def run_pass(thresholds):
        histograms, seen, dropped = histogram_pass(masked, data, thresholds)
        return histograms, dropped / seen

    dense, none = run_pass(None)
    assert not none.any()
    wanted = np.full((3, 7), 0.6)
    once = run_pass(dense.thresholds(wanted))[1]
    # 2,560 channels a projection in bins 0.8 % wide: counts step by 4e-4, and a bin holds a few of them.
    _, thresholds, achieved, passes = operating_point(run_pass, dense, wanted, shape, tolerance=1e-3, max_passes=25)
    assert passes < 25
    assert abs(shape.sparsity(achieved) - 0.6) <= 1e-3
    assert np.abs(achieved - wanted).max() <= 1e-2 < np.abs(once - wanted).max()
    # Evaluation counts the same on the same tokens. (A zero input counts as dropped in both.)
    evaluated = evaluate_thresholds(masked, data, thresholds)
    np.testing.assert_allclose(evaluated.achieved, achieved, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_the_first_projections_are_exact_at_once(masked, make_data, tokens, sparsity):
    data = make_data(tokens, batch_size=5)
    dense = histogram_pass(masked, data, None)[0]
    _, seen, dropped = histogram_pass(masked, data, dense.thresholds(np.full((3, 7), sparsity)))
    achieved = (dropped / seen)[0, :3]
    np.testing.assert_allclose(achieved, sparsity, atol=5e-3)  # a bin holds up to about 1 % of 2,560 scores
