"""The benchmark of decoding on a CPU writes a row for dense and for each sparsity."""

from __future__ import annotations

import pytest

from benchmarks import cpu_decode
from benchmarks.harness.rows import read_rows
from scripts.make_random_model import SHAPES


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_rows(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["tiny"], "vocab_size": 50})
    output = tmp_path / "rows.jsonl"
    options = ["--model", "tiny", "--blocks", "3", "--dtype", "fp32", "--sparsities", "0.5", "--rounds", "1"]
    cpu_decode.main([*options, "--tokens", "6", "--cache", cache, "--output", str(output)])
    dense, sparse = read_rows(output)
    assert (dense["backend"], dense["sparsity"], dense["speedup_median"]) == ("dense", 0.0, 1.0)
    assert sparse["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert (sparse["backend"], sparse["nominal_sparsity"], sparse["blocks"], sparse["cache"]) == ("auto", 0.5, 3, cache)
    assert sparse["speedup_median"] == pytest.approx(dense["median_ms"] / sparse["median_ms"])
    assert 0.0 < sparse["least_ms"] <= sparse["median_ms"] == pytest.approx(1e3 / sparse["tokens_per_s"])
    assert "% skipped, auto" in capsys.readouterr().out
