from __future__ import annotations

import dataclasses
import re

import pytest

from was_search.errors import ConfigError
from was_search.process import redaction
from was_search.service.settings import OPTIONS, Settings


def test_the_monotone_baseline_has_a_space_of_its_own():
    with pytest.raises(ConfigError, match="space: must be levels with the sampler was-monotone, got 'full'"):
        Settings(sampler="was-monotone", space="full", greedy_sequences=1)
    assert Settings(sampler="was-monotone", greedy_sequences=1).space == "levels"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("target", 0.0, "must be above 0 and below 0.95"),
        ("target", 0.95, "must be above 0 and below 0.95"),
        ("target", float("inf"), "must be above 0 and below 0.95"),
        ("trials", 0, "must be at least 1"),
        ("workers", 0, "must be at least 1"),
        ("workers", True, "must be a whole number, or MINIMUM:MAXIMUM such as 2:64"),
        ("quarantine_slowdown", 0.5, "must be above 1, or 0 for never"),
        ("quarantine_failures", -1, "must not be negative"),
        ("quarantine_seconds", 0.0, "must be positive, in seconds"),
        ("calibration_sequences", 0, "must be at least 1"),
        ("pricing_sequences", 0, "must be at least 1"),
        ("greedy_sequences", -1, "must not be negative"),
        ("search_sequences", -1, "must be at least 1"),
        ("test_sequences", 0, "must be at least 1"),
        ("batch_size", 0, "must be at least 1"),
        ("max_attempts", 0, "must be at least 1"),
        ("kl_top_k", 0, "must be at least 1"),
        ("kl_top_k", 6.5, "must be a whole number"),
        ("fitness", "mse", "must be one of nll, kl"),
        ("sequence_length", 1, "must be at least 2 tokens"),
        ("stride", -1, "must be in [0, sequence_length]"),
        ("stride", 2049, "must be in [0, sequence_length]"),
        ("dense_prefix", 2048, "must be in [0, sequence_length)"),
        ("seed", -1, "must be in [0, 2^32)"),
        ("seed", 2**32, "must be in [0, 2^32)"),
        ("seed_rounds", -1, "must not be negative"),
        ("descent_epochs", -1, "must not be negative"),
        ("descent_chains", 0, "must be at least 1"),
        ("radius", 0.0, "must be in (0, 1]"),
        ("radius", 1.1, "must be in (0, 1]"),
        ("significance", 0.0, "must be in (0, 0.5)"),
        ("significance", 0.5, "must be in (0, 0.5)"),
        ("rung_keep", 0.0, "must be in (0, 1]"),
        ("metrics", "host", "must be HOST:PORT or PORT"),
        ("rung_keep", 1.5, "must be in (0, 1]"),
        ("trial_timeout", -1.0, "must be positive, in seconds, or 0 for by measure"),
        ("gpus_per_worker", -0.5, "must be a share of one GPU, or a whole number"),
        ("gpus_per_worker", 1.5, "must be a share of one GPU, or a whole number"),
        ("gpus_per_worker", float("inf"), "must be a share of one GPU, or a whole number"),
        ("space", "blocks", "must be one of levels, temperature, additive, full"),
        ("sampler", "grid", "must be one of tpe, cmaes, gp, qmc, random, was-monotone"),
        ("score", "l3", "must be one of l1, l2, none"),
        ("device", "tpu", "must be one of auto, cpu, cuda"),
        ("dtype", "int8", "must be one of auto, float32, bfloat16, float16"),
        ("trials", "ten", "must be a whole number"),
        ("trials", 10.0, "must be a whole number"),
        ("trials", True, "must be a whole number"),
        ("target", "0.6", "must be a number"),
        ("target", True, "must be a number"),
        ("target", float("nan"), "must be a number"),
        ("model", 7, "must be text"),
        ("early_stopping", "yes", "must be true or false"),
        ("early_stopping", 1, "must be true or false"),
    ],
)
def test_every_option_says_its_rule_and_the_value(name, value, rule):
    with pytest.raises(ConfigError, match="^" + re.escape(f"{name}: {rule}, got {value!r}") + "$"):
        Settings(**{name: value})


def test_a_number_too_large_for_a_float():
    with pytest.raises(ConfigError, match=r"trial_timeout: must be a number that fits a float, got 10000000\.\.\."):
        Settings(trial_timeout=10**400)


@pytest.mark.parametrize("name", ["trials", "batch_size", "sequence_length", "seed", "compensation_steps"])
@pytest.mark.parametrize("value", [2**63, -(2**63), 10**5000], ids=["large", "negative", "huge"])
def test_a_whole_number_that_nothing_counts_to(name, value):
    """Before, ``integer out of range`` of the database, after all that comes before a study."""
    with pytest.raises(ConfigError, match=rf"^{name}: must be a whole number under 2\^63, got (-?\d{{19}}|one of)"):
        Settings(**{name: value})


def test_more_trials_than_a_study_may_have():
    assert Settings(trials=1_000_000).trials == 1_000_000
    with pytest.raises(ConfigError, match=r"^trials: must be at most 1000000, got 1000001$"):
        Settings(trials=1_000_001)


@pytest.mark.parametrize(
    "name", [name for name, option in OPTIONS.items() if option.kind is str and not option.choices]
)
def test_text_with_a_nul_character(name):
    """A TOML file may hold one; before, the database refused it, minutes later."""
    with pytest.raises(ConfigError, match=rf"^{name}: must be without NUL characters, got "):
        Settings(**{name: "a\0b"})


@pytest.mark.parametrize("gpus", [-1, 0, 0.25, 1, 2, 8])
def test_gpus_per_worker(gpus):
    assert Settings(gpus_per_worker=gpus).gpus_per_worker == gpus


def test_required_options():
    Settings(model="m", data="d").require("model", "data")
    with pytest.raises(ConfigError, match="data: missing; give --data or put it into the TOML file"):
        Settings(model="m").require("model", "data")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:s3cret@host:5432/db",
        "postgresql://ada:s3/cret@host/db",
        "postgresql://host/db?user=ada&password=s3cret&x=1",
        "postgresql://host/db?sslpassword=s3cret",
    ],
)
def test_json_leaves_the_password_out(url):
    found = Settings(storage=url).to_json()
    assert "cret" not in str(found)
    assert {**found, "storage": url} == dataclasses.asdict(Settings(storage=url))
    assert Settings().to_json()["storage"] == "embedded"


def test_secrets_are_taken_from_the_command_line_too():
    """The program's arguments are looked at before the table of options is read, so they are named there again."""
    secrets = {option.flag: option.env for option in OPTIONS.values() if option.secret}
    assert secrets == redaction.ENVIRONMENT


def test_every_option_is_documented():
    for field in dataclasses.fields(Settings):
        assert OPTIONS[field.name].help.endswith("."), field.name
        assert re.search(rf"^        {field.name}: \S", Settings.__doc__ or "", re.MULTILINE), field.name


def test_the_monotone_baseline_needs_its_table():
    with pytest.raises(ConfigError, match="greedy_sequences: must be at least 1 with --sampler was-monotone, got 0"):
        Settings(sampler="was-monotone")
    assert Settings(sampler="was-monotone", greedy_sequences=2).sampler == "was-monotone"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("targets", "0.5,1", "targets: each must be above 0"),
        ("max_ppl_increase", "5", "max_ppl_increase: must be a percentage"),
        ("target_speedups", "1.5,0.9", "target_speedups: each must be above 1, got 0.9"),
        ("target_speedups", "1.5,x", "target_speedups: must be numbers with commas between"),
        ("target_speedups", "1.5,1.50", "target_speedups: each may be given once"),
        ("target_speedup", 1.0, "target_speedup: must be above 1, or 0 for none, got 1.0"),
    ],
)
def test_what_is_asked_for_is_checked(name, value, rule):
    with pytest.raises(ConfigError, match=rule):
        Settings(**{name: value})


def test_what_is_asked_for_as_numbers():
    assert Settings(targets="0.6,0.4").budgets == (0.4, 0.6)
    assert Settings(max_ppl_increase="5%").increase_limit == 0.05
    assert Settings(target_speedups="2,1.5").speedups == (1.5, 2.0)
    assert Settings().budgets == Settings().speedups == ()
    assert Settings().increase_limit is None


@pytest.mark.parametrize("given", [{"targets": "0.4,0.5"}, {"max_ppl_increase": "5%"}, {"target_speedups": "1.5,2"}])
def test_a_step_for_one_target(given):
    Settings(target=0.5).require_one_target()
    Settings(target_speedup=1.5).require_one_target()
    name = next(iter(given))
    one = "--target-speedup" if name == "target_speedups" else "--target"
    with pytest.raises(ConfigError, match=f"^{name}: only 'was-search run' takes it; give {one} for one study$"):
        Settings(**given).require_one_target()
