from __future__ import annotations

import json

from benchmarks.harness.rows import append_row, read_rows


def test_rows_come_back(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert read_rows(path) == []
    for number in range(3):
        append_row(path, {"key": number})
    assert read_rows(path) == [{"key": 0}, {"key": 1}, {"key": 2}]


def test_a_line_that_was_cut_off_is_passed_over_and_kept_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"key": 0})
    with path.open("a") as file:
        file.write(json.dumps({"key": 1})[:-3])
    assert read_rows(path) == [{"key": 0}]
    append_row(path, {"key": 2})
    assert read_rows(path) == [{"key": 0}, {"key": 2}]
