from __future__ import annotations

import re

import pytest

from was_search.errors import ConfigError
from was_search.service.settings import Settings
from was_search.service.settings_file import load_settings


@pytest.fixture
def toml(tmp_path):
    def write(text: str):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_last_one_wins(toml):
    file = toml('target = 0.5\nbatch-size = 8\nsampler = "cmaes"\n')
    base = Settings(target=0.4, batch_size=2, trials=7, seed=3)
    found = load_settings(file, {"target": 0.7, "trials": None, "seed": 9}, base)
    assert found.target == 0.7  # flag over file
    assert found.batch_size == 8  # file over base
    assert found.sampler == "cmaes"
    assert found.trials == 7  # base over default; a flag of None is no flag
    assert found.seed == 9  # flag over base
    assert found.radius == Settings().radius  # the default


def test_names_with_dashes_and_underscores_are_the_same(toml):
    assert load_settings(toml("batch_size = 3"), {}) == load_settings(toml("batch-size = 3"), {})


def test_defaults():
    assert load_settings(None, {}) == Settings()


def test_a_flag_that_is_false_counts(toml):
    assert load_settings(toml("early-stopping = true"), {"early_stopping": False}).early_stopping is False


def test_whole_numbers_are_numbers(toml):
    found = load_settings(toml("trial-timeout = 60\ngpus-per-worker = 1"), {})
    assert (found.trial_timeout, found.gpus_per_worker) == (60.0, 1.0)
    assert isinstance(found.trial_timeout, float)


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"config: cannot read .*none\.toml \(No such file or directory\)"):
        load_settings(tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match=r"config: cannot read .* \(not a file\)"):
        load_settings(tmp_path, {})


@pytest.mark.parametrize(
    "content", [b"target = ", b"\xff\xfe\x00", b"trials = " + b"9" * 5000, b"model = " + b"[" * 9000]
)
def test_refuses_a_file_that_is_not_toml(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config: .*bad\.toml is not valid TOML: "):
        load_settings(path, {})


def test_refuses_unknown_options(toml):
    with pytest.raises(ConfigError, match=r"config: unknown option bogus, run; known: batch_size, .*workers$"):
        load_settings(toml("bogus = 1\n[run]\ntarget = 0.5"), {})


def test_values_of_the_file_are_checked_too(toml):
    with pytest.raises(ConfigError, match="trials: must be at least 1, got 0"):
        load_settings(toml("trials = 0"), {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": 0.5, "targets": "0.4,0.5"}, "targets: cannot be given together with target"),
        ({"target": 0.5, "max_ppl_increase": "5%"}, "max_ppl_increase: cannot be given together with target"),
        ({"targets": "0.4", "max_ppl_increase": "5%"}, "max_ppl_increase: cannot be given together with targets"),
        ({"target": 0.5, "target_speedup": 1.8}, "target_speedup: cannot be given together with target"),
        ({"targets": "0.4", "target_speedups": "1.8"}, "target_speedups: cannot be given together with targets"),
    ],
)
def test_one_question_at_a_time(given, message):
    with pytest.raises(ConfigError, match="^" + re.escape(f"{message}; give one of them") + "$"):
        load_settings(None, given)
    if "target" not in given:
        with pytest.raises(ConfigError, match=message):
            Settings(**given)


def test_a_flags_question_replaces_the_files(toml):
    file = toml('targets = "0.4,0.5"\n')
    assert load_settings(file, {}).budgets == (0.4, 0.5)
    assert load_settings(file, {"target": 0.3}) == Settings(target=0.3)
    assert load_settings(toml("target = 0.3"), {"max_ppl_increase": "5%"}).increase_limit == 0.05
    assert load_settings(toml("target-speedup = 1.8"), {"target": 0.3}) == Settings(target=0.3)
    assert load_settings(toml("target = 0.3"), {"target_speedup": 1.8}).target_speedup == 1.8
