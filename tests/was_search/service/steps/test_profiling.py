"""``was-search profile`` on some blocks of the packaged model: measured, cached, written, refused; ``bench`` with it.

What a shared CPU measures is no figure: tests look at what is written, not at how well it predicts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.doubles.profiles import synthetic_profile, vars_of
from tests.doubles.small_run import BLOCKS, small_model, small_settings
from was_search.decode_time.profile import LatencyProfile
from was_search.decode_time.time_budget import TimeBudget
from was_search.errors import ConfigError
from was_search.service.cli.main import app
from was_search.service.context import Context
from was_search.service.steps.budgets import budget_of
from was_search.service.steps.decode_time import profile_of, shape_key
from was_search.service.steps.profiling import profile
from was_search.vectors.budget import SparsityBudget
from was_storage.studies.cache import ArtifactCache

pytestmark = [pytest.mark.postgres]

run = CliRunner().invoke
MODEL = small_model()
QUICK = ["profile", "--model", MODEL, "--device", "cpu", "--kv-length", "32", "--steps", "1", "--rounds", "1"]


def last(output: str, event: str = "result") -> dict:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event][-1]


@pytest.fixture(scope="module")
def measured(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A file and what the command said."""
    path = tmp_path_factory.mktemp("profile") / "cpu.json"
    found = run(app, [*QUICK, "--check", "3", "--output", str(path), "--storage", postgres_url, "--json"])
    assert found.exit_code == 0, found.output
    return path, last(found.output)


def test_it_measures_and_writes_what_it_measured(measured):
    path, said = measured
    made = LatencyProfile.load(path)
    assert made.shape.n_blocks == len(BLOCKS)
    assert made.device.startswith("CPU, ")
    assert (made.dtype, made.backend, made.rows, made.kv_length) == ("float32", "cpu", 1, 32)
    assert (made.source, list(made.dense)) == ("measured", ["eager"])
    assert {"torch", "transformers", "was-search"} <= set(made.versions)
    assert len(made.curves) == 7  # a CPU reads each projection by itself, and all blocks are alike
    assert made.check["vectors"] == 3
    assert said["profile"]["hash"] == made.hash
    assert len(said["rows"]) == 3
    for row in said["rows"]:
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1.0)
    assert max(abs(row["error"]) for row in said["rows"]) == pytest.approx(made.check["max_error"])


def test_the_second_time_it_is_read(measured, postgres_url, tmp_path, monkeypatch):
    path, _ = measured
    monkeypatch.setattr("was_search.checkpoints.load.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    again = tmp_path / "again.json"
    found = run(app, [*QUICK, "--output", str(again), "--storage", postgres_url, "--json"])
    assert found.exit_code == 0, found.output
    assert last(found.output, "phase")["state"] == "cached"
    assert again.read_text() == path.read_text()


def test_other_conditions_are_measured_anew(measured, postgres_url):
    path, _ = measured
    before = LatencyProfile.load(path)
    found = run(app, [*QUICK, "--again", "--storage", postgres_url])
    assert found.exit_code == 0, found.output
    assert "can be asked for" in found.output
    with Context(small_settings(storage=postgres_url)) as context:
        stored = profile_of(context, context.settings)
        assert stored is not None and stored.measured_at >= before.measured_at
        assert stored.check == {}
        assert len(context.cache.list("profile")) == 1
        other = profile(context, kv_length=40, steps=1, rounds=1)
        assert other.kv_length == 40
        assert len(context.cache.list("profile")) == 2


def test_rounded_weights_have_profiles_of_their_own(measured, postgres_url, tmp_path):
    path = tmp_path / "int8.json"
    found = run(app, [*QUICK, "--weights", "int8", "--output", str(path), "--storage", postgres_url])
    assert found.exit_code == 0, found.output
    made = LatencyProfile.load(path)
    assert made.weights == "int8:128"
    assert "int8 weights in groups of 128 outputs" in " ".join(found.output.split())
    known = {}
    for weights in ("none", "int8", "int4"):
        with Context(small_settings(storage=postgres_url, weights=weights)) as context:
            known[weights] = profile_of(context, context.settings)
    assert known["none"] is not None and known["none"].weights == "none"
    assert known["int8"] is not None and known["int8"].hash == made.hash
    assert known["int4"] is None
    other = small_settings(storage=postgres_url, profile=str(path))
    with Context(other) as context, pytest.raises(ConfigError, match=r"of int8 weights .*these are weights as stored"):
        profile_of(context, context.settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "rows: must be at least 1, got 0"),
        (["--rows", "9"], "rows: at most 8 decode sparsely, got 9"),
        (["--kv-length", "31"], "kv_length: must be at least 32"),
        (["--kv-length", "1000000"], "kv_length: at most"),
        (["--steps", "0"], "steps: must be at least 1"),
        (["--rounds", "0"], "rounds: must be at least 1"),
        (["--check", "-1"], "check: must be at least 0"),
    ],
)
def test_it_refuses(postgres_url, options, message):
    found = run(app, [*QUICK, *options, "--storage", postgres_url])
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)


def test_the_newest_profile_of_the_models_shape_is_known(database, postgres_url):
    """Others' shapes are passed over; for a speed-up, profiles of two devices are refused."""
    cache = ArtifactCache(database)
    with Context(small_settings(storage=postgres_url)) as context:
        shape = context.model.shape
    for name in ("first", "second"):
        made = LatencyProfile(**{**vars_of(synthetic_profile(shape)), "device": name})
        meta = {"shape": shape_key(shape), "conditions": name, "hash": made.hash, "weights": made.weights}
        cache.replace("profile", name, json.dumps(made.to_json()).encode(), meta)
    cache.replace("profile", "of another", b"{}", {"shape": "another", "conditions": "third"})
    with Context(small_settings(storage=postgres_url)) as context:
        assert profile_of(context, context.settings).device == "second"
        assert budget_of(context.settings, shape, profile_of(context, context.settings)) == SparsityBudget(shape, 0.6)
    settings = small_settings(storage=postgres_url, target_speedup=1.5)
    with Context(settings) as context, pytest.raises(ConfigError, match=r"holds profiles of .* kinds .*say which one"):
        budget_of(context.settings, shape, profile_of(context, context.settings))
    for row in cache.list("profile"):
        if row.key != "second":
            cache.delete("profile", row.key)
    with Context(settings) as context:
        target = budget_of(context.settings, shape, profile_of(context, context.settings))
        assert isinstance(target, TimeBudget)
        assert (target.profile.device, target.speedup) == ("second", 1.5)
    cache.replace("profile", "second", b"{", {"shape": shape_key(shape), "conditions": "second"})
    with Context(settings) as context, pytest.raises(ConfigError, match="no profile of this model's shape is known"):
        budget_of(context.settings, shape, profile_of(context, context.settings))


def test_bench_prints_the_prediction_beside_the_measurement(tmp_path):
    from tests.doubles.tiny_models import tiny_plan
    from was_search.checkpoints.fingerprint import fingerprint
    from was_search.checkpoints.load import load_model, resolve_model
    from was_search.plan import Plan

    source = resolve_model(MODEL)
    made = tiny_plan(load_model(source, dtype="float32", device="cpu"))
    profile_file = synthetic_profile(made.shape)
    values = {**vars_of(profile_file), "dtype": "float32", "kv_length": 40}
    known = LatencyProfile(**values)
    known.save(tmp_path / "known.json")
    step = {"achieved": known.figures(made.sparsities), "profile": known.summary()}
    settings = small_settings()
    provenance = {"settings": {"model": settings.model, "data": settings.data}, "step": step}
    folder = Plan(
        **{
            **{n: getattr(made, n) for n in made.__dataclass_fields__},
            "fingerprint": fingerprint(source),
            "provenance": provenance,
        }
    ).save(tmp_path / "plan")
    bench = ["bench", "--plan", str(folder), "--kv-length", "40", "--steps", "2", "--device", "cpu"]
    found = run(app, [*bench, "--profile", str(tmp_path / "known.json"), "--json"])
    assert found.exit_code == 0, found.output
    dense, sparse = last(found.output)["rows"]
    assert dense["predicted_ms"] == pytest.approx(1e3 * known.dense["eager"])
    flat = np.full(made.shape.params.shape, sparse["sparsity"])
    assert sparse["predicted_ms"] == pytest.approx(1e3 * known.seconds(flat), rel=0.2)
    note = last(found.output, "note")["text"]
    assert note.startswith("the plan says: Predicted decoding step") and known.hash[:8] in note
    table = run(app, [*bench, "--profile", str(tmp_path / "known.json")])
    assert "predicted" in table.output
    LatencyProfile(**{**values, "kv_length": 256}).save(tmp_path / "other.json")
    other = run(app, [*bench, "--profile", str(tmp_path / "other.json"), "--json"])
    assert other.exit_code == 0, other.output
    assert "no prediction: the profile is of kv_length 256 for 40" in other.output
    assert all(row["predicted_ms"] is None for row in last(other.output)["rows"])
