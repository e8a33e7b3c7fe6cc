"""A study by divergence on real workers and Postgres, in small: search, status, plan and the cached top."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator

import numpy as np
import optuna
import pytest
from rich.console import Console

from tests.doubles.small_run import assert_each_finished_once, small_settings
from tests.doubles.workers_here import workers_here
from was_search.checkpoints.load import load_model, resolve_model
from was_search.errors import ConfigError, StudyError
from was_search.masks.evaluation import dense_top as direct_top
from was_search.masks.masked_model import MaskedModel
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.progress import JsonReporter, RichReporter
from was_search.service.steps import candidates, dense_predictions, exporting
from was_search.service.steps.dense import Dense
from was_search.service.steps.exporting import export
from was_search.service.steps.question import Question
from was_search.service.steps.study import search
from was_search.service.steps.study_identity import identity, study_name
from was_search.service.token_sets import TokenSets
from was_search.service.watching.study_status import status
from was_search.studies.slots import SlotState

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

K = 32


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    with workers_here():
        yield


@pytest.fixture(scope="module")
def settings(postgres_url: str):
    return small_settings(storage=postgres_url, trials=6, fitness="kl", kl_top_k=K, search_sequences=18)


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory: pytest.TempPathFactory):
    """The result of a small search and its plan; the cache holds the top in three pieces."""
    piece = 7 * 95 * K * 8
    with pytest.MonkeyPatch.context() as patch, Context(settings) as context:
        patch.setattr(dense_predictions, "PIECE_BYTES", piece)
        result = search(context)
    plan = tmp_path_factory.mktemp("kl") / "plan"
    with Context(dataclasses.replace(settings, plan=str(plan))) as context:
        return result, export(context), piece


def test_slots_and_trials_carry_both_figures(made, database) -> None:
    result, _, _ = made
    slots = assert_each_finished_once(database, result.study, 6)
    trials = {
        t.user_attrs["slot"]: t
        for t in optuna.load_study(study_name=result.study, storage=database.optuna_storage()).trials
    }
    for slot in slots:
        # sparse by 60 %: the divergence is well above 0 and well below the NLL
        assert 0.01 < slot.loss_nats < 0.9 * slot.nll_nats
        attrs = trials[slot.number].user_attrs
        if slot.state is not SlotState.COMPLETE:  # of a part of the sequences, which compares with no other trial's
            assert not {"perplexity", "nll_nats"} & set(attrs)
        else:
            assert attrs["perplexity"] == pytest.approx(np.exp(slot.nll_nats), abs=1e-5)
            assert attrs["nll_nats"] == pytest.approx(slot.nll_nats)
            assert trials[slot.number].value == slot.loss_nats == pytest.approx(slot.losses.mean())


def test_the_cached_top_is_the_dense_models(made, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, piece = made
    monkeypatch.setattr(dense_predictions, "PIECE_BYTES", piece)
    with Context(settings) as context:
        found = Dense(context).top
        assert "pool" not in vars(context)  # from the cache, in three pieces
        rows = [row for row in context.cache.list("dense-top") if row.size_bytes < piece]
        assert len(rows) >= 6
        data = TokenSets(context).search
    model = load_model(resolve_model(settings.model), dtype="float32", device="cpu")
    expected = direct_top(MaskedModel.of(model, "l2"), data, K)
    assert found.indices.dtype == np.int32
    assert found.indices.shape == (18, 95, K)
    # another number of threads may turn near ties around; log-probabilities in order of size do not care
    np.testing.assert_allclose(np.sort(found.log_probs[..., :K]), np.sort(expected.log_probs[..., :K]), atol=1e-3)
    np.testing.assert_allclose(found.log_probs[..., K], expected.log_probs[..., K], atol=1e-3)


def test_a_piece_that_is_missing_makes_it_anew(made, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, piece = made
    monkeypatch.setattr(dense_predictions, "PIECE_BYTES", piece)
    with Context(settings) as context:
        stored = dense_predictions.Pieces(
            context.cache, dense_predictions.dense_top_key(context, TokenSets(context).search), 18, 95, K
        )
        assert stored.get() is not None
        _, log_probs = stored.rows(7)
        assert context.cache.delete("dense-top", log_probs.key)
        assert stored.get() is None


def test_the_plan_reports_nll_and_was_chosen_by_divergence(made) -> None:
    _, folder, _ = made
    figures = Plan.load(folder).metrics["search"]
    assert 0.01 < figures["kl_nats"] < 0.9 * figures["loss_nats"]
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss_nats"]))
    test = Plan.load(folder).metrics["test"]
    assert "kl_nats" not in test
    assert test["perplexity"] == pytest.approx(np.exp(test["loss_nats"]))


def test_the_winner_is_the_contender_of_least_divergence(
    made, settings, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two are told apart by figures put in their place: by NLL the other one would win."""
    result, _, _ = made
    best = next(s for s in result.slots if s.origin.startswith("sampler:") and s.state is SlotState.COMPLETE)
    result = dataclasses.replace(
        result, slots=[dataclasses.replace(s, loss_nats=-1.0) if s is best else s for s in result.slots]
    )
    real = candidates.measure

    def measure(dense, requests):
        found = real(dense, requests)
        for i, request in enumerate(requests):
            if request.by_fitness:
                seed = request.name == "fisher seed"
                losses, nats = (np.full(18, 0.25), np.full(18, 3.0)) if seed else (np.full(18, 0.5), np.full(18, 2.0))
                changed = dataclasses.replace(found[i].evaluation, losses=losses, nats=nats)
                found[i] = dataclasses.replace(found[i], evaluation=changed)
        return found

    monkeypatch.setattr(exporting, "measure", measure)
    with Context(dataclasses.replace(settings, plan=str(tmp_path / "plan"))) as context:
        plan = Plan.load(exporting.export(context, result))
    assert plan.provenance["origin"] == "seed:fisher"
    assert (plan.metrics["search"]["kl_nats"], plan.metrics["search"]["loss_nats"]) == (0.25, 3.0)


def test_the_dense_model_diverges_by_nothing(made, settings) -> None:
    """The first thing that this context asks of its workers."""
    with Context(settings) as context:
        dense, request = Dense(context), candidates.Request("dense", "search", None, by_fitness=True)
        (found,) = candidates.measure(dense, [request])
        (again,) = candidates.measure(dense, [request])
    # the top was cached by workers of the same kind, in the same batches
    np.testing.assert_allclose(found.evaluation.losses, 0.0, atol=1e-6)
    assert found.evaluation.nll_nats() > 1.0
    np.testing.assert_array_equal(again.evaluation.losses, found.evaluation.losses)  # from the cache
    np.testing.assert_array_equal(again.evaluation.nats, found.evaluation.nats)


def test_status_and_studies_say_which_fitness(made, settings, database, capsys) -> None:
    result, _, _ = made
    with Context(settings, JsonReporter()) as context:
        record = status(context, result.study)
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (event["fitness"], event["identity"]["fitness"]) == ("kl", f"kl, dense top {K}")
    assert event["best_loss_nats"] == record.best_loss_nats == result.best.loss_nats
    note = [
        value
        for key, value in database.optuna_storage().get_study_system_attrs(record.optuna_study_id).items()
        if key.startswith("dashboard:note")
    ]
    assert any("nats of KL per token" in str(value) for value in note)


def test_the_status_table(made, settings) -> None:
    result, _, _ = made
    reporter = RichReporter(Console(file=io.StringIO(), highlight=False, width=200))
    with Context(settings, reporter) as context:
        status(context, result.study)
    shown = reporter.console.file.getvalue()
    best = result.best
    assert f"{best.loss_nats:.4f} nats of KL per token, perplexity {np.exp(best.nll_nats):.3f}" in shown
    assert f"kl, dense top {K}" in shown


def test_fitness_and_top_k_make_another_study(made, settings) -> None:
    result, _, _ = made
    other = dataclasses.replace(settings, study=result.study, kl_top_k=K + 1)
    with Context(other) as context, pytest.raises(StudyError, match=f"fitness: study has kl, dense top {K}, asked for"):
        export(context)
    with Context(dataclasses.replace(settings, fitness="nll")) as nll, Context(settings) as kl:
        assert study_name(Question.of(nll)) != study_name(Question.of(kl)) == result.study
        assert identity(Question.of(nll))["fitness"] == "nll"


def test_a_vocabulary_that_the_configuration_does_not_tell(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("was_search.checkpoints.files.read_config", lambda source: {})
    with Context(dataclasses.replace(settings, kl_top_k=1025)) as context:
        dense_predictions.check_vocabulary(context.model, 1025)
        with pytest.raises(ConfigError, match="kl_top_k: must be at most the vocabulary, 1024 tokens, got 1025"):
            _ = Dense(context).top


def test_nll_needs_no_top(settings) -> None:
    with Context(dataclasses.replace(settings, fitness="nll", kl_top_k=4000)) as context:
        assert Dense(context).top is None
        assert "database" not in vars(context)
