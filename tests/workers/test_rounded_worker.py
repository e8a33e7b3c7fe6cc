"""A worker whose model has rounded weights: calibration, prices, a descent and an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.workers.small_run import small_settings
from was_search.api import Context
from was_search.budget import SparsityBudget
from was_search.descent import DescentOptions
from was_search.histogram import Histograms
from was_workers.worker import Worker, WorkerSpec


@pytest.fixture(scope="module", params=["int8:128", "int4:128"])
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def worker(weights):
    settings = small_settings()
    return Worker(WorkerSpec(settings.model, "", "float32", "cpu", "l2", threads=1, weights=weights))


@pytest.fixture(scope="module")
def data(weights):
    with Context(small_settings(weights=weights)) as context:
        return context.tokens_uncached("calibration")


@pytest.fixture(scope="module")
def dense(worker, data) -> Histograms:
    return worker.histograms(data.tokens, None, 4, 1)[0]


def test_evaluates_at_the_sparsity_asked_for(worker, data, dense, weights):
    shape = worker.prepare().shape
    assert data.protocol.weights == weights
    plain = worker.evaluate_thresholds(data, None)
    masked = worker.evaluate(data, "key", dense, np.full(shape.params.shape, 0.5), None)
    assert 0.45 < shape.sparsity(masked.achieved) < 0.6
    assert plain.loss_nats < masked.loss_nats < plain.loss_nats + 0.3


def test_norms_are_those_of_the_rounded_weights(worker):
    linear = worker._model().structure.blocks[3].projections["up"]
    expected = linear.dense_weight().double().square().sum(0).sqrt()
    np.testing.assert_allclose(worker.norms()[3][5], expected, rtol=1e-5)


def test_prices_and_a_descent_go_through_rounded_weights(worker, data, dense):
    shape, predicted = worker.prepare().shape, data.protocol.predicted_per_sequence
    points = [dense.thresholds(np.full(shape.params.shape, level)) for level in (0.2, 0.5)]
    sums, n = worker.prices(data.tokens[:4], np.stack(points, axis=-1), 4, 1, predicted)
    assert n == 4 * predicted
    assert np.all(sums > 0) and (sums[..., 1] > sums[..., 0]).mean() > 0.9
    start = np.full(shape.params.shape, 0.6)
    end = worker.descend(
        data.tokens, dense, start, SparsityBudget(shape, 0.6), DescentOptions(rounds=4), 8, 4, 1, predicted, 0
    )
    assert shape.sparsity(end) == pytest.approx(0.6, abs=1e-6)
    losses = [worker.evaluate(data, "key", dense, vector, None).loss_nats for vector in (start, end)]
    assert losses[1] < losses[0]
