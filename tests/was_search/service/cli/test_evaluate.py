"""``evaluate``: a plan beside the dense model, two plans beside each other, and greedy continuations."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from tests.doubles.small_plan import make_plan
from tests.doubles.tiny_models import masked_logits
from was_search.checkpoints.load import load_model, resolve_model
from was_search.compensation import Compensation
from was_search.errors import ConfigError, PlanError
from was_search.plan import Plan
from was_search.service.cli.main import app
from was_search.service.cli.plan import OF_A_COMPENSATION, load_plan
from was_search.service.context import Context
from was_search.service.steps import continuations
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.service.steps.evaluation import evaluate
from was_search.service.token_sets import tokens_here

run = CliRunner().invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For plans, with a text that is soon in tokens."""
    made = tmp_path_factory.mktemp("plans")
    text = (DEMO_FOLDER / "text" / "test.txt").read_text(encoding="utf-8")
    (made / "text.txt").write_text(text[:20_000], encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def plan(folder: Path) -> Path:
    return make_plan(folder / "half", data=str(folder / "text.txt"))


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """Made with other options in everything that a plan decides by itself."""
    options = {"sparsity": 0.6, "dense_prefix": 4, "score": "l1", "masks": "shared"}
    return make_plan(folder / "other", data=str(folder / "text.txt"), **options)


@pytest.fixture(scope="module")
def rounded(folder: Path) -> Path:
    return make_plan(folder / "rounded", "int4", data=str(folder / "text.txt"))


@cache
def result(*given: object) -> dict:
    """What the command says, asked once."""
    found = run(app, ["evaluate", *map(str, given), "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.output.splitlines()[-1])


def losses_of(path: Path) -> np.ndarray:
    loaded, base = load_plan(path)
    with Context(base) as context:
        return evaluate(context, loaded)[-1].sparse.losses


def test_flips_and_total_variation_are_of_the_test_text(plan):
    loaded, base = load_plan(plan)
    with Context(base) as context:
        ids = torch.as_tensor(tokens_here(context, "test").tokens)
    model = load_model(resolve_model(base.model), dtype="float32", device="cpu")
    with torch.inference_mode():
        dense = model(ids, use_cache=False).logits[:, :-1].double().numpy()
    sparse = masked_logits(model, loaded, ids)[:, :-1].double().numpy()
    found = result("--plan", plan)["plan"]
    variation = 0.5 * np.abs(softmax(dense, axis=-1) - softmax(sparse, axis=-1)).sum(-1).mean()
    assert found["total_variation"] == pytest.approx(variation, rel=1e-5)  # float32 against float64
    # batches of eight in both; a near tie of float32 logits may be turned around, one of 504 tokens
    assert found["flip_rate"] == pytest.approx((dense.argmax(-1) != sparse.argmax(-1)).mean(), abs=1.5 / 504)
    assert 0.05 < found["flip_rate"] < 0.9


def test_the_table_shows_them_for_the_plan_alone(plan):
    shown = run(app, ["evaluate", "--plan", str(plan), "--device", "cpu"], env={"COLUMNS": "160"}).output
    dense, sparse = (line for line in shown.splitlines() if re.search(r"│ (dense|plan) ", line))
    figures = result("--plan", plan)["plan"]
    assert f"│  {100 * figures['flip_rate']:.1f} │ {figures['total_variation']:.3f} │" in sparse
    assert re.search(r"│ +│ +│ +│$", dense)
    assert "TV: total variation distance" in " ".join(shown.split())


def test_two_plans_are_compared_by_the_paired_test(plan, other):
    found = result("--plan", plan, "--against", other)
    mine, theirs = losses_of(plan), losses_of(other)
    expected = ttest_rel(mine, theirs)
    interval = expected.confidence_interval(0.95)
    assert found["difference"]["mean"] == pytest.approx(np.mean(mine - theirs), rel=1e-9)
    assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx(
        (interval.low, interval.high), rel=1e-9
    )
    assert found["p_value"] == pytest.approx(expected.pvalue, rel=1e-9)
    shown = run(app, ["evaluate", "--plan", str(plan), "--against", str(other), "--device", "cpu"]).output
    said = " ".join(shown.split())
    assert f"plan - against: {np.mean(mine - theirs):+.4f} ± " in said
    assert f"paired over 8 sequences; negative: plan is better), p = {expected.pvalue:.2g}" in said
    assert "each plan under its own dense prefix, 1 and 4 token(s)" in said


def test_each_plan_has_its_own_prefix_score_and_masks(plan, other):
    """What a plan has beside another one is what it has alone, with the settings that it was made with."""
    both, alone = result("--plan", plan, "--against", other), [result("--plan", path) for path in (plan, other)]
    assert both["plan"] == alone[0]["plan"] and both["dense"] == alone[0]["dense"] == alone[1]["dense"]
    assert both["against"] == alone[1]["plan"]
    # an option that is given counts for both
    both = result("--plan", plan, "--against", other, "--dense-prefix", 2)
    assert both["against"] == result("--plan", other, "--dense-prefix", 2)["plan"] != alone[1]["plan"]


def test_each_plan_has_its_own_compensation(plan, tmp_path):
    loaded = Plan.load(plan)
    values = Compensation.none(loaded.shape).flat()
    values += np.random.default_rng(0).normal(0, 0.02, len(values)).astype(np.float32)
    corrected = dataclasses.replace(loaded, compensation=Compensation.from_flat(loaded.shape, values))
    both = result("--plan", plan, "--against", corrected.save(tmp_path / "corrected"))
    assert both["plan"] == result("--plan", plan)["plan"]
    assert both["against"] == result("--plan", tmp_path / "corrected")["plan"]
    assert both["against"]["flip_rate"] != both["plan"]["flip_rate"]
    assert both["against"]["achieved_sparsity"] != both["plan"]["achieved_sparsity"]


def test_a_plan_for_rounded_weights_has_them(plan, rounded):
    both, alone = result("--plan", plan, "--against", rounded), result("--plan", rounded)["weights"]
    assert both["against"] == alone["int4:128"]["plan"] and both["against_dense"] == alone["int4:128"]["dense"]
    assert both["plan"] == result("--plan", plan)["plan"]
    forced = result("--plan", plan, "--against", rounded, "--weights", "none")
    assert forced["against"] == alone["none"]["plan"] and "against_dense" not in forced


def test_the_table_of_two_formats_says_so(plan, rounded):
    given = ["evaluate", "--plan", str(plan), "--against", str(rounded), "--device", "cpu", "--test-sequences", "1"]
    said = " ".join(run(app, given, env={"COLUMNS": "200"}).output.split())
    assert "dense, int4:128 weights" in said and "from the dense model with weights of the same format" in said
    assert "one sequence makes no interval; give more with --test-sequences" in said


def test_a_plan_does_not_differ_from_itself(plan):
    found = result("--plan", plan, "--against", plan)
    assert found["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and found["p_value"] == 1.0


@pytest.fixture
def short_texts(monkeypatch):
    monkeypatch.setattr(continuations, "NEW_TOKENS", 12)


def test_continuations_are_compared_with_the_dense_models(plan, other, short_texts):
    found = result("--plan", plan, "--against", other, "--continuations", 99, "--test-sequences", 2)
    for name in ("plan", "against"):
        texts = found[name]["continuations"]
        assert (texts["prompts"], texts["prompt_tokens"], texts["new_tokens"]) == (2, 64, 12)  # no more than there are
        assert texts["equal"] in (0.0, 0.5, 1.0) and 0.0 <= texts["until_difference"] <= 12.0
    assert found["plan"]["continuations"] != found["against"]["continuations"]
    given = ["evaluate", "--plan", str(plan), "--device", "cpu", "--continuations", "1", "--sequence-length", "24"]
    assert re.search(r"plan: \d+\.0 % of 1 greedy continuations", run(app, given).output)


def test_continuations_are_of_the_plans_own_format(rounded, short_texts):
    found = result("--plan", rounded, "--continuations", 1)["weights"]
    assert "continuations" in found["int4:128"]["plan"] and "continuations" not in found["none"]["plan"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--continuations", "-1"], "continuations: must be at least 0, got -1"),
        (["--continuations", "2", "--tasks", "arc"], "continuations: are of text; leave out --tasks"),
        (["--continuations", "2", "--weights", "int8"], "decoding takes weights as the plan has them; give --weights"),
        (["--against", "PLAN", "--tasks", "arc"], "against: compares two plans on text; give --plan, no --tasks"),
        (["--against", "PLAN", "--weights", "none,int8"], "and one format of --weights"),
        (["--limit", "5"], "limit: is of tasks; give --tasks"),
        (["--tasks", " ,"], "tasks: names none; leave it out for perplexity"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be_compared(plan, given, words):
    given = [str(plan) if part == "PLAN" else part for part in given]
    found = run(app, ["evaluate", "--plan", str(plan), "--device", "cpu", *given])
    assert isinstance(found.exception, ConfigError)
    assert words in str(found.exception) and "\n" not in str(found.exception)


def test_an_empty_plan_and_key_are_refused(plan):
    for given, words in (
        (["evaluate", "--plan", ""], "plan: is empty; give a plan's folder"),
        (
            ["serve", "--plan", str(plan), "--api-key", ""],
            "API key: is empty; leave --api-key and WAS_SEARCH_API_KEY out",
        ),
    ):
        found = run(app, given)
        assert isinstance(found.exception, ConfigError) and words in str(found.exception)


def test_a_key_in_the_environment_that_is_empty_is_refused(plan, monkeypatch):
    monkeypatch.setenv("WAS_SEARCH_API_KEY", "")
    found = run(app, ["serve", "--plan", str(plan)])
    assert isinstance(found.exception, ConfigError) and "API key: is empty" in str(found.exception)


def test_the_working_directory_may_be_a_plan(plan, monkeypatch):
    monkeypatch.chdir(plan)
    assert load_plan(Path("."))[0].fingerprint == Plan.load(plan).fingerprint


def test_a_compensation_is_learned_as_the_plans_was(plan, tmp_path):
    made = Plan.load(plan)
    settings = {**made.provenance["settings"], "compensation_steps": 3, "slope_sequences": 8}
    changed = dataclasses.replace(made, provenance={**made.provenance, "settings": settings})
    changed.save(tmp_path / "plan")
    assert load_plan(tmp_path / "plan")[1].compensation_steps == 150
    base = load_plan(tmp_path / "plan", OF_A_COMPENSATION)[1]
    assert (base.compensation_steps, base.slope_sequences) == (3, 8)


def test_refuses_to_compare_without_a_plan(plan):
    model = ["evaluate", "--model", load_plan(plan)[1].model, "--data", load_plan(plan)[1].data, "--device", "cpu"]
    found = run(app, [*model, "--against", str(plan)])
    assert isinstance(found.exception, ConfigError) and "give --plan" in str(found.exception)
    found = run(app, [*model, "--continuations", "2", "--sequence-length", "64"])
    assert isinstance(found.exception, ConfigError)
    assert "continuations: are compared with the dense model's; give --plan" in str(found.exception)


def test_refuses_a_plan_of_another_model_or_a_missing_one(plan, tmp_path):
    loaded = Plan.load(plan)
    stranger = dataclasses.replace(loaded, model="stranger", fingerprint="0" * 64).save(tmp_path / "stranger")
    found = run(app, ["evaluate", "--plan", str(plan), "--against", str(stranger), "--device", "cpu"])
    assert isinstance(found.exception, PlanError)
    assert "this plan belongs to another model: plan stranger 000" in str(found.exception)
    assert "load the model" not in found.output  # it was refused before
    found = run(app, ["evaluate", "--plan", str(plan), "--against", str(tmp_path / "none"), "--device", "cpu"])
    assert isinstance(found.exception, PlanError)
    assert "plan.json: cannot be read (No such file or directory)" in str(found.exception)
