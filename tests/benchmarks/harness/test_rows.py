from __future__ import annotations

import json

import pytest

from benchmarks.harness.rows import append_row, conditions_path, read_rows


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


def test_conditions_are_written_once_and_come_back_with_each_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in range(4):
        append_row(path, {"key": number}, {"device": "a" if number < 3 else "b", "lengths": [1, 2]})
    assert read_rows(path) == [{"key": n, "device": "b" if n == 3 else "a", "lengths": [1, 2]} for n in range(4)]
    assert len(conditions_path(path).read_text().splitlines()) == 2
    assert "device" not in path.read_text()


def test_conditions_that_were_cut_off_are_written_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"key": 0}, {"device": "a"})
    whole = conditions_path(path).read_text()
    path.unlink()
    conditions_path(path).write_text(whole[:-5])
    append_row(path, {"key": 1}, {"device": "a"})
    assert read_rows(path) == [{"key": 1, "device": "a"}]


def test_a_row_without_its_conditions_is_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"key": 0}, {"device": "a"})
    conditions_path(path).unlink()
    with pytest.raises(ValueError, match=r"rows\.conditions\.jsonl: a row of rows\.jsonl wants conditions"):
        read_rows(path)
