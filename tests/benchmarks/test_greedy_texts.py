"""The comparison of greedy texts: what it counts, and a whole one of a small model, its server included."""

from __future__ import annotations

import json

import pytest

from benchmarks.greedy_texts import Row, compared, line, main
from tests.doubles.small_run import small_model


def test_texts_are_compared_up_to_the_first_other_token():
    reference = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert compared(reference, reference) == (3, 3.0)
    assert compared([[1, 2, 3], [4, 0, 6], [7, 8]], reference) == (1, (3 + 1 + 2) / 3)


def test_a_line_says_how_many_steps_agree_where_that_is_known():
    row = Row("m", "fp32", 0.5, "our loop", 6, 40, 2, 27.25, 0.925)
    assert "2 of 6 texts, 27.2 tokens before the first other, the likeliest token of 92.5% of the steps" in line(row)
    assert line(Row("m", "fp32", 0.5, "vllm serve", 6, 40, 2, 27.25, None)).endswith(
        "27.2 tokens before the first other"
    )


@pytest.mark.slow
def test_a_small_models_texts_agree_in_float32(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    main(["--model", small_model(), "--tokens", "5", "--output", str(output)])
    rows = [json.loads(text) for text in output.read_text().splitlines()]
    ways = [row["way"] for row in rows]
    assert ways == [
        *("generate, dynamic cache (cpu)", "generate, static cache (cpu)", "our loop (cpu)"),
        *("the dense model", "was-search serve"),
    ]
    assert all(row["equal"] == row["texts"] == 6 for row in rows if row["way"] != "the dense model")
    assert rows[0]["same_steps"] == 1.0
    assert len(capsys.readouterr().out.splitlines()) == 5
