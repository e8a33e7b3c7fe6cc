"""Data are read by what is in them; what cannot be read is refused, and the protocol's line says what was read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import pytest

from tests.fresh_python import said_by
from tests.places.data_files import DOCUMENTS, JOINED, LINES, READ, REFUSED
from tests.was_search.texts.test_tokens import PLAIN
from was_search.errors import DataError
from was_search.texts import documents
from was_search.texts.documents import read_file
from was_search.texts.protocol import SPLITS
from was_search.texts.splits import load_text
from was_search.texts.tokens import tokenise


@pytest.mark.parametrize("place", READ)
def test_the_same_documents_are_the_same_text(place, tmp_path):
    said, build = READ[place]
    path = build(tmp_path)
    parts = [load_text(str(path), split) for split in SPLITS]
    assert "".join(part.text for part in parts) == JOINED
    assert {part.kind for part in parts} == {said}
    assert f", {said}, [test]" in tokenise(parts[2], PLAIN, sequence_length=16).protocol.describe()


@pytest.mark.parametrize("place", REFUSED)
def test_what_cannot_be_read_is_refused(place, tmp_path):
    message, build = REFUSED[place]
    path = build(tmp_path)
    for split in SPLITS:
        with pytest.raises(DataError, match=message):
            load_text(str(path), split)


@pytest.mark.parametrize(
    "text",
    [
        "[a link](page.md)\n",
        "{% extends 'page' %}\n",
        "{}\n[]\n",
        "text\n",
        "Some, text\n",
        "from somewhere import a,text\n",
        '"text"\n',
        "[1, 2]\n",
    ],
)
@pytest.mark.parametrize("name", ["x.txt", "x.MD", "x.py", "x"])
def test_plain_text_is_plain_text(text, name, tmp_path):
    path = tmp_path / name
    path.write_text(text * 20)
    parts = [load_text(str(path), split) for split in SPLITS]
    assert "".join(part.text for part in parts) == text * 20
    assert {part.kind for part in parts} == {""}
    assert "x" in (line := tokenise(parts[0], PLAIN, sequence_length=4).protocol.describe())
    assert f"{name} [calibration]" in line


def test_files_called_after_splits_hold_them_whatever_their_kind(tmp_path):
    (tmp_path / "Calibration.TXT").write_text("a\n")
    (tmp_path / "search.jsonl").write_text(LINES)
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(json.dumps([{"text": "b"}]).encode()))
    found = {split: load_text(str(tmp_path), split) for split in SPLITS}
    assert [found[split].text for split in SPLITS] == ["a\n", JOINED, "b"]
    assert [found[split].kind for split in SPLITS] == [
        "",
        f"{len(DOCUMENTS)} documents of JSON lines",
        "1 document of a JSON array in gzip",
    ]


def test_what_was_read_is_said_and_decides_nothing(tmp_path):
    text = load_text(str(READ["parquet"][1](tmp_path)), "test")
    protocol = tokenise(text, PLAIN, sequence_length=16).protocol
    assert "kind" not in protocol.to_json()
    assert type(protocol).from_json(protocol.to_json()) == protocol


def test_a_cell_may_be_longer_than_the_csv_module_takes(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f'id,text\n1,"{"word " * 100_000}"\n2,b\n')
    assert read_file(path).text == "word " * 100_000 + "\n\nb"


@pytest.mark.parametrize("text", ["word " * 100_000 + "\nmore\n", "a\rb\rc", '"' * 200_000])
def test_a_first_line_that_is_no_header(text, tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(text.encode())
    assert read_file(path).text == text


def test_a_folder_reads_every_kind_that_lies_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("plain\n")
    (tmp_path / "b").mkdir()
    READ["gzipped_lines"][1](tmp_path / "b")
    READ["comma_separated"][1](tmp_path)
    found = [load_text(str(tmp_path), split) for split in SPLITS]
    assert "".join(part.text for part in found) == f"plain\n\n{JOINED}\n{JOINED}"
    assert found[0].kind == "3 files, 60 documents of JSON lines in gzip, 60 documents of CSV"


@pytest.mark.parametrize("content", ['{"content": "a"}\n', '{"text": "a"}\n{"content": "a"}\n', '{"text": "a'])
def test_a_folder_with_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "a.txt").write_text("plain\n" * 50)
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"b\.jsonl, line \d: must be a JSON object"):
        load_text(str(tmp_path), "test")


def test_only_parquet_imports_its_library(tmp_path):
    path = READ["gzipped_lines"][1](tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        f"from was_search.texts.splits import load_text; load_text({str(path)!r}, 'test')\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert said_by(code) == "[]"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress], ids=lambda pack: pack.__module__)
def test_more_text_than_memory_should_hold_is_refused(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(documents, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "text"
    path.write_bytes(pack(b"word " * (1 << 18)))
    with pytest.raises(DataError, match=r"text has more than 1 MiB.*give a part of it"):
        read_file(path)
    path.write_bytes(pack(b"a" * (1 << 20)))
    assert len(read_file(path).text) == 1 << 20


def test_what_unpacks_without_end_is_read_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"more than 1 MiB once it is unpacked \(gzip\)"):
        read_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
