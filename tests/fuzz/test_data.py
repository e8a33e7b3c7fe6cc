"""Data that were cut, flipped or are of other values: read as what they are, or refused in one line."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import VALUES, changed, damaged, in_one_line
from tests.places.data_files import READ, ROWS
from was_search.errors import DataError
from was_search.texts.documents import read_file
from was_search.texts.protocol import SPLITS
from was_search.texts.splits import load_text

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
NAMES = st.sampled_from(["x", "x.txt", "x.md", "x.json", "x.jsonl", "x.NDJSON", "x.csv", "x.tsv", "x.parquet", "x.gz"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The contents of every file that is read."""
    made = (build(tmp_path_factory.mktemp(name)) for name, (_, build) in READ.items())
    return [path.read_bytes() for path in made if path.is_file()]


def texts(path: Path) -> list[str] | None:
    """The three splits, None for what is refused."""
    try:
        parts = [load_text(str(path), split) for split in SPLITS]
    except DataError as error:
        in_one_line(error)
        with pytest.raises(DataError):
            load_text(str(path), "test")
        return None
    assert all(part.sha256 and part.text.strip() for part in parts)
    return [part.text for part in parts]


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_bytes_under_any_name(folder: Path, places: list[bytes], data: st.DataObject) -> None:
    path = folder / data.draw(NAMES)
    path.write_bytes(data.draw(st.sampled_from(places).flatmap(damaged)))
    texts(path)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_json_lines_and_arrays_hold_what_json_says(folder: Path, data: st.DataObject) -> None:
    rows = data.draw(changed(ROWS[:6], ("text",)))
    lines = data.draw(st.booleans()) and isinstance(rows, list)
    content = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path = folder / data.draw(st.sampled_from(["x.json", "x.jsonl"]))
    path.write_text(content)
    rows = rows if isinstance(rows, list) else [rows]
    whole = bool(rows) and all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows)
    try:
        found = read_file(path)
    except DataError:
        assert not whole or "\\ud8" in content
    else:
        assert whole or not found.text
        assert found.text == "\n\n".join(row["text"] for row in rows if found.text)


@settings(max_examples=EXAMPLES)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5))
def test_tables_hold_what_was_written(folder: Path, cells: list[str]) -> None:
    for delimiter, name in ((",", "x.csv"), ("\t", "x.tsv"), (";", "x.csv")):
        out = io.StringIO()
        csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(cells)])
        (folder / name).write_bytes(out.getvalue().encode())
        assert read_file(folder / name).text == "\n\n".join(cells)


@settings(max_examples=EXAMPLES)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200), VALUES)
def test_plain_text_is_what_it_was_or_refused(folder: Path, text: str, value: object) -> None:
    for content in (text, json.dumps(value) + "\n" + text):
        path = folder / "x.txt"
        path.write_bytes(content.encode())
        try:
            found = read_file(path)
        except DataError as error:
            in_one_line(error)
        else:
            assert found.text == content.removeprefix("\ufeff") or found.kind
