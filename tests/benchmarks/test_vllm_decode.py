"""The benchmark of vLLM: folders with plans take turns, and the least time of each counts. vLLM itself is not run."""

from __future__ import annotations

import pytest

from benchmarks import vllm_decode
from benchmarks.harness.rows import read_rows
from scripts.make_random_model import make_random_model
from was_search.plan import Plan


def test_folders_take_turns_and_the_least_time_counts(tmp_path, monkeypatch, capsys):
    make_random_model(tmp_path / "model", "tiny")
    asked = []

    def measured(folder, options):
        asked.append(folder.name)
        if folder.name == "50":
            plan = Plan.load(folder)
            assert plan.budget == 0.5 and (folder / "config.json").is_file()
        return {"model": 0.020, "50": 0.010}[folder.name] * (1.5 if len(asked) < 3 else 1.0)

    monkeypatch.setattr(vllm_decode, "measured", measured)
    monkeypatch.setattr(vllm_decode, "engine_version", lambda: "0")
    output = tmp_path / "rows.jsonl"
    vllm_decode.main(["--model", str(tmp_path / "model"), "--sparsities", "0.5", "--output", str(output)])
    assert asked == ["model", "50", "model", "50"]
    dense, sparse = read_rows(output)
    assert (dense["sparsity"], dense["speedup"], dense["token_ms"]) == (0.0, 1.0, pytest.approx(20.0))
    assert (sparse["sparsity"], sparse["speedup"], sparse["token_ms"]) == (0.5, pytest.approx(2.0), pytest.approx(10.0))
    assert "plan of 50%" in capsys.readouterr().out.splitlines()[-1]
