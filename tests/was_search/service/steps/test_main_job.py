"""From a model to a plan that decodes, on real Ray and Postgres, in small; then once more from the cache."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from optuna.artifacts import get_all_artifact_meta

from tests.doubles.small_run import (
    BLOCKS,
    assert_each_finished_once,
    coarse_greedy,
    environment,
    small_model,
    small_settings,
)
from tests.doubles.workers_here import workers_here
from tests.fresh_python import run_fresh
from was_kernels import sparsify
from was_search.checkpoints.load import load_model, load_tokenizer, resolve_model
from was_search.errors import ConfigError, StudyError
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.plan import Plan
from was_search.service.cli.plan import load_plan
from was_search.service.context import Context
from was_search.service.steps import evaluation, study_identity
from was_search.service.steps.evaluation import evaluate, evaluate_on_tasks
from was_search.service.steps.exporting import export
from was_search.service.steps.main_job import run
from was_search.service.steps.question import Question
from was_search.service.steps.seeding import sensitivity
from was_search.service.steps.study import search
from was_search.service.steps.study_identity import identity, study_name
from was_search.service.token_sets import TokenSets
from was_search.texts.protocol import content_hash
from was_search.vectors.seeds import SEED_DESCENT
from was_storage.dashboard import study_page
from was_storage.dashboard.plan_files import PlanFiles
from was_storage.studies.store import StudyStore

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    with coarse_greedy():
        yield


@pytest.fixture(scope="module")
def made(postgres_url: str, tmp_path_factory: pytest.TempPathFactory):
    """Settings and result of one small run."""
    plan = tmp_path_factory.mktemp("run") / "plan"
    settings = small_settings(
        storage=postgres_url, trials=12, plan=str(plan), greedy_sequences=1, seed_rounds=2, descent_epochs=1
    )
    with Context(settings) as context:
        return settings, run(context)


def test_run_makes_a_plan_and_compares_it(made, database) -> None:
    _, result = made
    slots = assert_each_finished_once(database, result.search.study, 12)
    assert [s.origin for s in slots][3:6] == ["descent:0:mean", "descent:0:0", "descent:0:1"]
    assert all(s.origin == "sampler:tpe" for s in slots[6:])
    names = [row.name for row in result.rows]
    assert names[:4] == ["dense", "uniform", "greedy-uniform", "fisher seed"]
    assert names[4].startswith("best (slot")
    for row in result.rows[1:]:
        assert row.nominal == pytest.approx(0.6, abs=1e-9)
        # the re-calibration's tolerance is 0.05 points of sparsity, or six passes
        assert row.calibration_achieved == pytest.approx(0.6, abs=0.005)
        assert row.test.achieved == pytest.approx(0.6, abs=0.03)  # 8 calibration sequences only
    assert [row.test.evaluation.distance is None for row in result.rows] == [True, False, False, False, False]
    report = StudyStore(database).get(result.search.study).report
    plan = Plan.load(result.plan)
    best = result.rows[-1].test.evaluation.distance.to_json()
    assert {name: plan.metrics["test"][name] for name in best} == best
    assert report["metrics"]["test"]["flip_rate"] == best["flip_rate"]
    assert report["metrics"]["search"]["loss_nats"] == plan.metrics["search"]["loss_nats"]
    assert plan.provenance["study"] == result.search.study


BOTH_SPLITS = """
import sys
from was_search.service.cli.main import main
for split in ("search", "test"):
    sys.argv[1:] = ["evaluate", "--plan", PLAN, "--split", split, "--json"]
    try:
        main()
    except SystemExit as ending:
        if ending.code:
            raise
"""


def test_the_plan_in_a_fresh_process_gives_the_recorded_loss(made, database, tmp_path: Path) -> None:
    """Both splits in one: it takes seconds to start."""
    _, result = made
    recorded = StudyStore(database).get(result.search.study).report["metrics"]
    done = run_fresh(BOTH_SPLITS.replace("PLAN", repr(str(result.plan))), environment(), tmp_path)
    assert done.returncode == 0, done.stderr
    results = [found for found in map(json.loads, done.stdout.splitlines()) if "plan" in found]
    for split, found in zip(("search", "test"), results, strict=True):
        # same dtype, batches and thresholds: only the number of threads differs
        assert found["plan"]["loss_nats"] == pytest.approx(recorded[split]["loss_nats"], abs=1e-3)
        assert found["plan"]["achieved_sparsity"] == pytest.approx(recorded[split]["achieved_sparsity"], abs=1e-3)
        assert found["dense"]["loss_nats"] == pytest.approx(recorded["dense"][split]["loss_nats"], abs=1e-3)
    assert found["plan"]["flip_rate"] == pytest.approx(recorded["test"]["flip_rate"], abs=5e-3)
    assert found["plan"]["total_variation"] == pytest.approx(recorded["test"]["total_variation"], abs=1e-3)


def test_the_sparse_runtimes_logits_match_the_masked_reference(made) -> None:
    _, result = made
    plan = Plan.load(result.plan)
    source = resolve_model(small_model())
    # In float32 the order of a sum may carry a score over its threshold, and that moves a logit by tenths.
    model, tokenizer = load_model(source, dtype="float32", device="cpu").double(), load_tokenizer(source)
    ids = tokenizer("def area(radius):\n    return 3.14159 * radius ** 2\n", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        with Masking(MaskedModel.of(model, plan.score), plan.thresholds, dense_prefix=plan.dense_prefix):
            expected = model(ids).logits
        with sparsify(model, plan) as sparse:
            prefill = sparse(ids).logits
            cache, steps = None, []
            for position in range(ids.shape[1]):
                out = sparse(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits[:, -1])
    # RMSNorm rounds to float32 in any case; logits are of order 10.
    torch.testing.assert_close(prefill, expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(torch.stack(steps, 1), expected, atol=1e-5, rtol=1e-6)


def test_sensitivity_is_read_from_the_cached_prices(made) -> None:
    settings, _ = made
    with Context(settings) as context:
        costs = sensitivity(Question.of(context))
        assert "pool" not in vars(context)
    assert costs.shape == (len(BLOCKS), 7)
    assert costs.min() > 0.0  # a square, and 60 % of any input matters on some token
    # By far on this checkpoint: keys are read by every later token, and down's inputs are mostly near zero.
    assert costs[:, 6].mean() < 0.2 * costs[:, 1].mean()


def test_a_second_run_is_read_from_the_cache(made) -> None:
    settings, first = made
    with Context(settings) as context:
        second = run(context)
        assert "pool" not in vars(context)
        assert "cluster" not in vars(context)
    assert second.search.study == first.search.study
    for a, b in zip(first.rows, second.rows, strict=True):
        np.testing.assert_array_equal(a.test.evaluation.losses, b.test.evaluation.losses)


@pytest.mark.parametrize(("change", "named"), [({"target": 0.5}, "target"), ({"search_sequences": 16}, "search data")])
def test_a_study_of_other_settings_is_refused_with_the_differences(made, change, named: str) -> None:
    settings, result = made
    other = dataclasses.replace(settings, study=result.search.study, **change)
    with Context(other) as context, pytest.raises(StudyError, match=named):
        search(context)


def test_a_study_of_another_seed_recipe_is_refused(made, monkeypatch) -> None:
    """Another version's steps and prices make other seeds, so their study is another one under the same options."""
    settings, result = made
    monkeypatch.setattr(study_identity, "SEED_DESCENT", dataclasses.replace(SEED_DESCENT, step=0.06))
    monkeypatch.setattr(study_identity, "PRICES", 3)
    named = r"prices: study has 4, asked for 3\n  seed descent: study has .*step 0\.04, asked for .*step 0\.06$"
    named_study = dataclasses.replace(settings, study=result.search.study)
    with Context(named_study) as context, pytest.raises(StudyError, match=named):
        export(context)
    with Context(settings) as context:
        assert study_name(Question.of(context)) != result.search.study


def test_the_dashboards_note_and_figures_are_written_once(made, monkeypatch) -> None:
    settings, _ = made
    written: list[str] = []
    monkeypatch.setattr(study_page, "show_idle", lambda database, study, note, figures: written.append(note))
    with Context(settings) as context:
        run(context)
    (note,) = written
    assert "## Settings" in note and "fisher seed" in note


def test_the_dashboards_trials_carry_what_people_look_for(made, database) -> None:
    _, result = made
    study = optuna.load_study(study_name=result.search.study, storage=database.optuna_storage())
    for trial in study.trials:
        assert {"slot", "origin", "levels", "sparsities", "achieved_sparsity", "seconds", "worker"} <= set(
            trial.user_attrs
        )
    keys = (
        study.system_attrs if hasattr(study, "system_attrs") else study._storage.get_study_system_attrs(study._study_id)
    )
    assert any(key.startswith("dashboard:note") for key in keys)
    for name in ("sensitivity", "levels", "progress", "progress-time", "timeline", "tokens-saved"):
        assert any(name in key for key in keys), name
    (artifact,) = get_all_artifact_meta(study)
    with zipfile.ZipFile(PlanFiles(database).open_reader(artifact.artifact_id)) as packed:
        assert packed.read("plan.json") == (made[1].plan / "plan.json").read_bytes()
    assert any("plot" in key for key in keys)


def test_tasks_for_the_plan_beside_the_dense_model(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="the optional extra 'tasks' is not installed")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _, result = made
    plan = Plan.load(result.plan)
    documents = [{"text": f"import {name}\nimport", "choices": ["os", "?!"]} for name in ("re", "sys", "ast", "json")]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    task = {
        "task": "after_import",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    (tmp_path / "after_import.yaml").write_text(json.dumps(task))  # JSON is YAML
    with Context(small_settings(storage="embedded")) as context:  # the database is not opened
        found = evaluate_on_tasks(context, plan, ["after_import"], limit=None, include_path=tmp_path)
    assert set(found) == {"dense", "plan"}
    for results in found.values():
        assert [(r.task, r.n) for r in results] == [("after_import", 4)]
        assert results[0].value == 1.0  # "import os" is far likelier than "import ?!", sparse or not


def test_an_unknown_task_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(evaluation, "load_for", lambda *_: pytest.fail("loaded"))
    # lm-eval takes seconds to read what it knows
    monkeypatch.setattr("was_search.service.steps.tasks._manager", lambda *_: SimpleNamespace(all_tasks=["arc"]))
    with (
        Context(small_settings(storage="embedded")) as context,
        pytest.raises(ConfigError, match="no task, group or tag 'nosuch'"),
    ):
        evaluate_on_tasks(context, None, ["nosuch"], limit=None, include_path=tmp_path)


def test_tasks_are_of_masked_text_whatever_a_plan_does_with_prompts(made, monkeypatch: pytest.MonkeyPatch) -> None:
    _, result = made
    ids = torch.tensor([[5, 9, 11, 7]] * 9)

    def logits(model, *_, **__) -> torch.Tensor:
        with torch.inference_mode():
            prompt = model(ids[:, :3], use_cache=True)
            step = model(ids[:, 3:], past_key_values=prompt.past_key_values)
        return torch.cat([prompt.logits, step.logits], dim=1)

    monkeypatch.setattr("was_search.service.steps.tasks.evaluate_tasks", logits)
    monkeypatch.setattr("was_search.service.steps.tasks.check_tasks", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "show_tasks", lambda *_: None)
    found = {}
    for prefill in ("masked", "dense"):
        plan = dataclasses.replace(Plan.load(result.plan), prefill=prefill)
        with Context(small_settings(storage="embedded")) as context:
            found[prefill] = evaluate_on_tasks(context, plan, ["any"], limit=None, include_path=None)
    assert torch.equal(found["masked"]["plan"], found["dense"]["plan"])
    changed = (found["dense"]["plan"] - found["dense"]["dense"]).abs().amax(dim=(0, 2))
    assert changed[0] == 0.0  # the dense prefix
    assert (changed[1:] > 1e-3).all()  # prompt and step of nine rows


def test_another_seed_is_another_study_with_its_own_prices(made) -> None:
    settings, result = made
    with Context(settings) as context, Context(dataclasses.replace(settings, seed=1)) as other:
        ours, theirs = (TokenSets(each).calibration.protocol for each in (context, other))
        assert ours.tokens_hash != theirs.tokens_hash  # the same sequences in another order
        assert study_name(Question.of(other)) != result.search.study
        assert content_hash(ours) != content_hash(theirs)


def test_a_study_says_with_which_steps_it_descends(postgres_url: str) -> None:
    words = {}
    for chains in (1, 2, 3):
        with Context(small_settings(storage=postgres_url, descent_epochs=2, descent_chains=chains)) as context:
            words[chains] = identity(Question.of(context))["descents"]
    assert words[1].startswith("epochs 2, ") and words[1].endswith(", step 0.04, width 1")
    assert words[2].endswith(", step 0.04 and 0.015, width 1")
    assert words[3].endswith(", step 0.04 and 0.015 and 0.04, width 1")


@pytest.mark.parametrize("change", [{"target": 0.5}, {"score": "l1"}])
def test_export_refuses_a_study_of_other_settings(made, tmp_path: Path, change) -> None:
    settings, result = made
    other = dataclasses.replace(settings, study=result.search.study, plan=str(tmp_path), **change)
    with Context(other) as context, pytest.raises(StudyError, match=next(iter(change))):
        export(context)
    assert not list(tmp_path.iterdir())


def test_a_plan_from_a_gpu_cluster_is_evaluated_here(made, tmp_path: Path, monkeypatch) -> None:
    _, result = made
    plan = Plan.load(result.plan)
    theirs = {**plan.provenance["settings"], "ray": "203.0.113.1:6379", "gpus_per_worker": 0.25, "device": "auto"}
    dataclasses.replace(plan, provenance={**plan.provenance, "settings": theirs}).save(tmp_path / "plan")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, base = load_plan(tmp_path / "plan")
    with Context(base) as context:
        (found,) = evaluate(context, Plan.load(tmp_path / "plan"), "search")
        assert "cluster" not in vars(context)
    assert found.sparse.loss_nats == pytest.approx(plan.metrics["search"]["loss_nats"], abs=1e-3)


def test_a_study_with_shared_masks(postgres_url: str, database, tmp_path: Path) -> None:
    settings = small_settings(storage=postgres_url, trials=5, plan=str(tmp_path / "plan"), space="full", seed_rounds=1)
    shared = dataclasses.replace(settings, masks="shared")
    with workers_here(), Context(settings) as separate, Context(shared) as context:
        assert study_name(Question.of(separate)) != study_name(Question.of(context))
        result = run(context)
        slots = StudyStore(database).slots(result.search.study)
        (evaluation,) = evaluate(context, Plan.load(result.plan))
    assert len(slots) == 5
    for slot in slots:
        for group in ((0, 1, 2), (4, 5)):
            assert np.ptp(slot.sparsities[:, list(group)], axis=1).max() == 0.0
    record = StudyStore(database).get(result.search.study)
    assert record.identity["masks"] == "shared"
    assert record.shape["masks"] == "shared"
    plan = Plan.load(result.plan)
    assert plan.shape.masks == "shared"
    assert plan.shape.sparsity(plan.sparsities) == pytest.approx(0.6, abs=1e-9)
    assert evaluation.sparse.loss_nats == pytest.approx(plan.metrics["test"]["loss_nats"], abs=1e-6)
    _, base = load_plan(result.plan)
    assert base.masks == "shared"
