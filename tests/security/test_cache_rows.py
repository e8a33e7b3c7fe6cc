"""Damaged rows of the cache under the real steps: each is noticed, removed and computed again, never used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from tests.doubles.small_run import coarse_greedy, small_settings
from tests.doubles.workers_here import workers_here
from was_search.service.context import Context
from was_search.service.steps.candidates import Request, measure
from was_search.service.steps.exporting import _norms
from was_search.service.steps.question import Question
from was_search.service.steps.seeding import seed
from was_storage.server.database import Database
from was_storage.studies.cache import Artifact, ArtifactCache

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

KINDS = {
    "tokens", "histograms", "operating-point", "prices", "descent", "greedy", "dense-top", "evaluation", "norms"
}  # fmt: skip


@pytest.fixture(scope="module")
def context(postgres_url: str) -> Iterator[Context]:
    settings = small_settings(
        storage=postgres_url, workers=1, fitness="kl", kl_top_k=8, greedy_sequences=1, seed_rounds=1,
        search_sequences=8, test_sequences=4,
    )  # fmt: skip
    with workers_here(), coarse_greedy(0.2), Context(settings) as opened:
        yield opened


def everything(context: Context) -> dict[str, Any]:
    """Every figure that is cached, by step, to a question that nothing is known of yet."""
    question = Question.of(context)
    dense = question.dense
    seeds = seed(context, question)
    point = dense.point(seeds[-1].sparsities, "the seed")
    top = dense.top
    assert top is not None
    figures, on_test = measure(
        dense, [Request("seed", "search", point, by_fitness=True), Request("seed", "test", point)]
    )
    distance = on_test.evaluation.distance
    assert distance is not None
    return {
        "tokens": dense.tokens.search.tokens,
        "histograms": dense.calibration.histograms.counts,
        "seeds": np.stack([s.sparsities for s in seeds]),
        "thresholds": point.thresholds,
        "point": point.histograms.counts,
        "indices": top.indices,
        "log_probs": top.log_probs,
        "losses": figures.evaluation.losses,
        "nats": figures.evaluation.nats,
        "flips": distance.flips,
        "variation": distance.variation,
        "norms": np.concatenate([norm for row in _norms(dense) for norm in row]),
    }


@pytest.fixture(scope="module")
def right(context: Context) -> dict[str, Any]:
    found = everything(context)
    assert {info.kind for info in context.cache.list()} == KINDS
    return found


def test_a_second_time_everything_is_read(
    context: Context, right: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context.pool, "map", None)  # nothing may be computed
    again = everything(context)
    assert all(np.array_equal(again[name], right[name]) for name in right)
    assert "damaged" not in caplog.text


def flip(cache: ArtifactCache, database: Database, kind: str, key: str) -> None:
    """One bit of the payload or, where there is none, of a number beside it."""
    statement = (
        "UPDATE was.artifact SET payload = CASE WHEN length(payload) > 0 THEN "
        "set_byte(payload, length(payload) / 2, get_byte(payload, length(payload) / 2) # 1) ELSE payload END, "
        "meta = CASE WHEN length(payload) > 0 THEN meta ELSE "
        "jsonb_set(meta, '{table,blocks,0,levels,1}', '0.123') END WHERE kind = :kind AND key = :key"
    )
    with database.begin() as connection:
        connection.execute(text(statement), {"kind": kind, "key": key})


def shorten(cache: ArtifactCache, database: Database, kind: str, key: str) -> None:
    """A shorter payload whose hash fits, as whoever writes a wrong row would leave it."""
    found: list[Artifact] = []
    cache.get(kind, key, found.append)
    if not found:
        return  # damaged before, and read by no step
    cache.delete(kind, key)
    meta = found[0].meta if found[0].payload else {"table": {"name": "greedy", "blocks": []}}
    cache.put(kind, key, found[0].payload[:-8], meta)


@pytest.mark.parametrize("damage", [flip, shorten])
def test_damaged_rows_are_computed_again(
    context: Context,
    right: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    damage: Any,
) -> None:
    for kind, key in [(info.kind, info.key) for info in context.cache.list()]:
        damage(context.cache, context.database, kind, key)
    with caplog.at_level(logging.WARNING):
        again = everything(context)
    for name, value in right.items():
        assert np.array_equal(again[name], value), name
    noticed = {kind for kind in KINDS if f"cached {kind} " in caplog.text}
    assert noticed == KINDS
    caplog.clear()
    test_a_second_time_everything_is_read(context, right, caplog, monkeypatch)  # of good rows
