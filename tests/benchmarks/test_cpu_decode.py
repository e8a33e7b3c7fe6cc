"""The benchmark of decoding on a CPU writes a row for dense, and for each sparsity and format of weights."""

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
    options += ["--weights", "none", "int4:32", "--tokens", "6", "--cache", cache]
    cpu_decode.main([*options, "--output", str(output)])
    dense, sparse, rounded = read_rows(output)
    assert [row["weights"] for row in (dense, sparse, rounded)] == ["none", "none", "int4:32"]
    assert rounded["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert (dense["backend"], dense["sparsity"], dense["speedup_median"]) == ("dense", 0.0, 1.0)
    assert sparse["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert (sparse["backend"], sparse["nominal_sparsity"], sparse["blocks"], sparse["cache"]) == ("auto", 0.5, 3, cache)
    assert sparse["speedup_median"] == pytest.approx(dense["median_ms"] / sparse["median_ms"])
    assert 0.0 < sparse["least_ms"] <= sparse["median_ms"] == pytest.approx(1e3 / sparse["tokens_per_s"])
    out = capsys.readouterr().out
    assert "% skipped, auto, none" in out and "% skipped, auto, int4:32" in out
