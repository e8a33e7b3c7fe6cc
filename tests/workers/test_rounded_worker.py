"""A worker whose model has rounded weights: calibration, prices, a descent and an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.doubles.small_run import small_settings
from was_search.coordinator.calls import Held
from was_search.coordinator.model_calls import Calibrate, Descend, Evaluate, EvaluateThresholds, Norms, Price
from was_search.masks.histogram import Histograms
from was_search.service.context import Context
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.service.token_sets import tokens_here
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions
from was_workers.worker import Worker, WorkerSpec

MODEL = str(DEMO_FOLDER / "model")
"""All of it: fewer blocks lose more to a mask than the bound below."""


@pytest.fixture(scope="module", params=["int8:128", "int4:128"])
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def worker(weights):
    settings = small_settings(model=MODEL)
    return Worker(WorkerSpec(settings.model, "", "float32", "cpu", "l2", threads=1, weights=weights))


@pytest.fixture(scope="module")
def data(weights):
    with Context(small_settings(model=MODEL, weights=weights)) as context:
        return tokens_here(context, "calibration")


@pytest.fixture(scope="module")
def dense(worker, data) -> Histograms:
    return worker.run(Calibrate(Held(data), None))[0]


def test_evaluates_at_the_sparsity_asked_for(worker, data, dense, weights):
    shape = worker.prepare().shape
    assert data.protocol.weights == weights
    plain = worker.run(EvaluateThresholds(data, None))
    masked = worker.run(Evaluate(Held(data), Held(dense), np.full(shape.params.shape, 0.5)))
    assert 0.45 < shape.sparsity(masked.achieved) < 0.6
    assert plain.loss_nats < masked.loss_nats < plain.loss_nats + 0.3


def test_norms_are_those_of_the_rounded_weights(worker):
    linear = worker.model.structure.blocks[3].projections["up"]
    expected = linear.dense_weight().double().square().sum(0).sqrt()
    np.testing.assert_allclose(worker.run(Norms())[3][5], expected, rtol=1e-5)


def test_prices_and_a_descent_go_through_rounded_weights(worker, data, dense):
    shape, predicted = worker.prepare().shape, data.protocol.predicted_per_sequence
    points = [dense.thresholds(np.full(shape.params.shape, level)) for level in (0.2, 0.5)]
    sums, n = worker.run(Price(data.part(slice(4)), np.stack(points, axis=-1)))
    assert n == 4 * predicted
    assert np.all(sums > 0) and (sums[..., 1] > sums[..., 0]).mean() > 0.9
    start = np.full(shape.params.shape, 0.6)
    shared = Held(data), Held(dense)
    end = worker.run(Descend(*shared, start, SparsityBudget(shape, 0.6), DescentOptions(rounds=4), per_round=8, seed=0))
    assert shape.sparsity(end) == pytest.approx(0.6, abs=1e-6)
    losses = [worker.run(Evaluate(*shared, vector)).loss_nats for vector in (start, end)]
    assert losses[1] < losses[0]
