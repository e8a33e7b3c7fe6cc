"""Figures of candidates on real workers and Postgres: shared out, merged, cached, and the same however they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.doubles.small_run import small_settings
from tests.doubles.workers_here import workers_here
from was_search.coordinator.model_calls import EvaluateBesideDense, EvaluateThresholds
from was_search.service.context import Context
from was_search.service.steps.candidates import Figures, Request, measure
from was_search.service.steps.dense import Dense

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


def measured(settings: Any, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[list[Figures], list[Any]]:
    """Figures of two vectors and the dense model, and the calls that were made for them."""
    calls: list[Any] = []
    with workers_here(), Context(settings) as context:
        dense = Dense(context)
        shape = dense.calibration.shape
        vectors = {name: np.full((shape.n_blocks, 7), sparsity) for name, sparsity in (("a", 0.4), ("b", 0.6))}
        points = {name: dense.point(vector, name) for name, vector in vectors.items()}
        if monkeypatch is not None:
            real = context.pool.map
            monkeypatch.setattr(context.pool, "map", lambda given, **more: calls.extend(given) or real(given, **more))
        requests = [
            Request("a", "test", points["a"]),
            Request("dense", "search", None),
            Request("dense", "test", None),
            Request("b", "test", points["b"]),
            Request("b", "search", points["b"]),
        ]
        return measure(dense, requests), calls


def test_figures_are_bit_equal_whatever_the_number_of_workers(postgres_url: str, monkeypatch) -> None:
    settings = small_settings(storage=postgres_url, test_sequences=18)
    one, calls = measured(dataclasses.replace(settings, workers=1), monkeypatch)
    beside = [call for call in calls if isinstance(call, EvaluateBesideDense)]
    # the dense model on the test split comes with the candidates: five batches on one worker, four shards
    assert [len(call.thresholds) for call in beside] == [2, 2, 2, 2]
    assert [call.thresholds is None for call in calls if isinstance(call, EvaluateThresholds)] == [True, False]

    cached, none = measured(settings, monkeypatch)
    assert none == []
    with Context(settings) as context:
        for row in context.cache.list("evaluation"):
            context.cache.delete("evaluation", row.key)
    three, calls = measured(dataclasses.replace(settings, workers=3), monkeypatch)
    assert len([call for call in calls if isinstance(call, EvaluateBesideDense)]) == 5
    for mine, *others in zip(one, cached, three, strict=True):
        for other in others:
            assert other.achieved == mine.achieved
            np.testing.assert_array_equal(other.evaluation.losses, mine.evaluation.losses)
            np.testing.assert_array_equal(other.evaluation.achieved, mine.evaluation.achieved)
            assert (other.evaluation.distance is None) == (mine.evaluation.distance is None)
            if mine.evaluation.distance is not None:
                np.testing.assert_array_equal(other.evaluation.distance.flips, mine.evaluation.distance.flips)
                np.testing.assert_array_equal(other.evaluation.distance.variation, mine.evaluation.distance.variation)
    assert [f.evaluation.distance is None for f in one] == [False, True, True, False, True]
    with Context(settings) as context:
        tokens = Dense(context).tokens
        figures = [f.to_json(tokens) for f in one]
    assert 0.0 < figures[0]["flip_rate"] < figures[3]["flip_rate"] < 1.0
    assert 0.0 < figures[0]["total_variation"] < figures[3]["total_variation"] < 1.0
    assert "flip_rate" not in figures[2] and "total_variation" not in figures[4]
