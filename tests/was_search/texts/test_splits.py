"""Splits are disjoint, whole and the same each time; every message names its path."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.fresh_python import said_by
from was_search.errors import DataError
from was_search.texts.protocol import SPLITS
from was_search.texts.splits import SplitText, load_text

ROOT = Path(__file__).parents[3]


def lines(count: int) -> str:
    return "".join(f"line {i} of {count}\n" for i in range(count))


def test_one_file_is_cut_at_line_ends_into_disjoint_parts(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(lines(1000))
    parts = [load_text(str(path), split) for split in SPLITS]
    assert "".join(part.text for part in parts) == lines(1000)
    assert all(part.text.endswith("\n") for part in parts)
    shares = [len(part.text) / len(lines(1000)) for part in parts]
    assert shares == pytest.approx([0.4, 0.3, 0.3], abs=0.005)  # one line is 0.1 %
    assert {part.name for part in parts} == {"book.txt"}


def test_a_last_line_without_an_end_is_kept(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a\nb\nc\nd\ne")
    assert "".join(load_text(str(path), split).text for split in SPLITS) == "a\nb\nc\nd\ne"


def test_a_folder_with_the_three_files_uses_them(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(f"this is {split}\n")
    (tmp_path / "other.txt").write_text("not used")
    for split in SPLITS:
        assert load_text(str(tmp_path), split) == SplitText(tmp_path.name, split, f"this is {split}\n")


def test_any_other_folder_is_joined_by_path(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden\n" * 50)
    (tmp_path / "b" / "x.py").write_text("x = 1\n" * 100)
    (tmp_path / "a.md").write_text("words\n" * 100)
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    (tmp_path / "picture.png").write_bytes(b"\0\1")
    joined = "".join(load_text(str(tmp_path), split).text for split in SPLITS)
    assert joined == "words\n" * 100 + "\n" + "x = 1\n" * 100 + "\n" + "one\n\ntwo"


def test_a_jsonl_file_holds_documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} é\n"}) + "\n" for i in range(50)))
    joined = "".join(load_text(str(path), split).text for split in SPLITS)
    assert joined == "\n\n".join(f"document {i} é\n" for i in range(50))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + lines(20).encode())
    assert load_text(str(path), "calibration").text.startswith("line 0")


def test_the_hash_is_of_the_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(lines(30) + "é\n" * 30)
    part = load_text(str(path), "test")
    assert part.sha256 == hashlib.sha256(part.text.encode("utf-8")).hexdigest()
    assert load_text(str(path), "search").sha256 != part.sha256


def test_the_name_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(lines(30))
    monkeypatch.chdir(tmp_path)
    assert load_text(".", "test").name == tmp_path.name


def test_a_local_file_comes_before_a_named_data_set(tmp_path, monkeypatch):
    (tmp_path / "c4").write_text(lines(30))
    monkeypatch.chdir(tmp_path)
    assert load_text("c4", "calibration").text.startswith("line 0")


def test_reading_text_and_hashes_imports_neither_torch_nor_transformers():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import was_search.texts.splits, was_search.checkpoints.fingerprint, was_search.texts.named\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert said_by(code) == "[]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"book\.txt is empty"),
        (b" \n\n", r"book\.txt is empty"),
        (b"abc\0def", r"book\.txt is a binary file, not text \(NUL at byte 3\)"),
        (b"abcd\n\xff\xfe", r"book\.txt is not UTF-8 text \(byte 5\); convert it"),
        (b"one line only\n", r"book\.txt cannot be cut .* search split would be empty \(14 characters in 1 lines\)"),
        (b"a\nb", r"book\.txt cannot be cut"),
    ],
)
@pytest.mark.parametrize("split", SPLITS)
def test_bad_files_are_refused_for_every_split(tmp_path, content, message, split):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(str(path), split)


def test_nothing_there():
    with pytest.raises(DataError, match=r"one of wikitext2, c4, alpaca, got '/no/such/file', which does not exist"):
        load_text("/no/such/file", "test")


def test_an_unknown_split(tmp_path):
    with pytest.raises(DataError, match="split: must be one of calibration, search, test, got 'train'"):
        load_text(str(tmp_path), "train")


def test_a_folder_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"holds no text files \(\*\.txt, \*\.md, \*\.py, \*\.json, "):
        load_text(str(tmp_path), "test")
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(DataError, match=r"the text files of .* are empty"):
        load_text(str(tmp_path), "test")


def test_a_folder_with_two_of_three_splits(tmp_path):
    (tmp_path / "calibration.txt").write_text("a")
    (tmp_path / "test.txt").write_text("b")
    with pytest.raises(DataError, match=r"has calibration\.txt, test\.txt but not search\.txt"):
        load_text(str(tmp_path), "test")


def test_split_files_that_are_empty_or_alike(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(split)
    (tmp_path / "search.txt").write_text("")
    with pytest.raises(DataError, match=r"search\.txt is empty"):
        load_text(str(tmp_path), "test")
    (tmp_path / "search.txt").write_text("test")
    with pytest.raises(DataError, match=r"search\.txt and test\.txt of .* same text; splits must not overlap"):
        load_text(str(tmp_path), "calibration")


@pytest.mark.parametrize("line", ["not json", '{"words": 1}', "[1]", '"text"'])
def test_bad_json_lines(tmp_path, line):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r'documents\.jsonl, line 2: must be a JSON object with "text"'):
        load_text(str(path), "test")


def test_a_json_line_whose_text_is_none(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match='line 1: "text" must be a string, got int'):
        load_text(str(path), "test")


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("a")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"book\.txt cannot be read \(Permission denied\)"):
        load_text(str(path), "test")
