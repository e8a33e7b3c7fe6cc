"""Files and folders of data as people have them: one builder a place, of the same documents or of what is refused.

A builder takes an empty folder and gives the path to hand in. A new kind is one function more under its decorator.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

DOCUMENTS = [f'document {i}, é,\t"quoted"\nwith <{i % 7}> lines\n' for i in range(60)]
"""The documents that every place of :data:`READ` holds: with delimiters, quotes and line ends inside."""

JOINED = "\n\n".join(DOCUMENTS)
ROWS = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

Builder = Callable[[Path], Path]
READ: dict[str, tuple[str, Builder]] = {}
"""Places that are read: what the protocol's line says of them, and how they are made."""

REFUSED: dict[str, tuple[str, Builder]] = {}
"""Places that are refused: a part of the message as a regular expression, and how they are made."""


def _read(said: str) -> Callable[[Builder], Builder]:
    def add(build: Builder) -> Builder:
        READ[build.__name__] = (said, build)
        return build

    return add


def _refused(message: str) -> Callable[[Builder], Builder]:
    def add(build: Builder) -> Builder:
        REFUSED[build.__name__] = (message, build)
        return build

    return add


def _table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([row["id"], row["text"]] for row in ROWS)])
    return out.getvalue()


def _put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@_read("60 documents of JSON lines")
def ndjson(folder: Path) -> Path:
    return _put(folder / "x.ndjson", LINES)


@_read("60 documents of JSON lines")
def capital_jsonl(folder: Path) -> Path:
    return _put(folder / "x.JSONL", LINES)


@_read("60 documents of JSON lines")
def lines_named_json(folder: Path) -> Path:
    return _put(folder / "x.json", LINES)


@_read("60 documents of JSON lines")
def lines_named_text(folder: Path) -> Path:
    return _put(folder / "x.txt", LINES)


@_read("60 documents of JSON lines")
def lines_without_a_suffix(folder: Path) -> Path:
    return _put(folder / "x", "\ufeff\r\n" + LINES.replace("\n", "\r\n"))


@_read("60 documents of a JSON array")
def array(folder: Path) -> Path:
    return _put(folder / "x.json", json.dumps(ROWS))


@_read("60 documents of a JSON array")
def indented_array_named_text(folder: Path) -> Path:
    return _put(folder / "x.txt", json.dumps(ROWS, indent=2))


@_read("1 document of JSON")
def one_indented_object(folder: Path) -> Path:
    return _put(folder / "x.json", json.dumps({"id": 1, "text": JOINED}, indent=2))


@_read("60 documents of CSV")
def comma_separated(folder: Path) -> Path:
    return _put(folder / "x.csv", _table(","))


@_read("60 documents of CSV")
def semicolons_named_dat(folder: Path) -> Path:
    return _put(folder / "x.dat", "\ufeff" + _table(";"))


@_read("60 documents of TSV")
def tab_separated(folder: Path) -> Path:
    return _put(folder / "x.TSV", _table("\t"))


@_read("60 documents of CSV")
def one_column(folder: Path) -> Path:
    out = io.StringIO()
    csv.writer(out).writerows([["text"], *([text] for text in DOCUMENTS)])
    return _put(folder / "x.csv", out.getvalue())


def _parquet(path: Path, **columns: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@_read("60 documents of Parquet")
def parquet(folder: Path) -> Path:
    return _parquet(folder / "x.parquet", id=list(range(60)), text=list(DOCUMENTS))


@_read("60 documents of Parquet")
def parquet_named_otherwise(folder: Path) -> Path:
    return _parquet(folder / "train-00000-of-00001", text=list(DOCUMENTS))


@_read("60 documents of JSON lines in gzip")
def gzipped_lines(folder: Path) -> Path:
    return _put(folder / "x.jsonl.gz", gzip.compress(LINES.encode()))


@_read("60 documents of JSON lines in gzip")
def gzip_without_its_name(folder: Path) -> Path:
    return _put(folder / "x.jsonl", gzip.compress(LINES[:500].encode()) + gzip.compress(LINES[500:].encode()))


@_read("60 documents of CSV in bzip2")
def bzipped_table(folder: Path) -> Path:
    return _put(folder / "x.csv.bz2", bz2.compress(_table(",").encode()))


@_read("60 documents of a JSON array in xz")
def xz_array(folder: Path) -> Path:
    return _put(folder / "x.json.xz", lzma.compress(json.dumps(ROWS).encode()))


@_read("gzip")
def gzipped_text(folder: Path) -> Path:
    return _put(folder / "x.txt.gz", gzip.compress(JOINED.encode()))


@_read("1 file, 60 documents of JSON lines; not read: picture.png and 1 more")
def folder_of_lines(folder: Path) -> Path:
    _put(folder / "x.NDJSON", LINES)
    _put(folder / "settings.json", '{"width": 3}')
    _put(folder / "picture.png", b"\0")
    return folder


@_refused(r"x\.jsonl, line 31: must be a JSON object")
def truncated_lines(folder: Path) -> Path:
    return _put(folder / "x.jsonl", "".join(LINES.splitlines(True)[:30]) + '{"text": "the disk was fu')


@_refused(r"x\.data, line 2: must be a JSON object")
def lines_with_a_rest(folder: Path) -> Path:
    return _put(folder / "x.data", LINES.splitlines()[0] + "\nand prose\n" * 9)


@_refused(r"x\.txt is no whole JSON array; copy it again")
def truncated_array(folder: Path) -> Path:
    return _put(folder / "x.txt", json.dumps(ROWS)[:-9])


@_refused(r'x\.json, line 1: must be a JSON object with "text"')
def prose_named_json(folder: Path) -> Path:
    return _put(folder / "x.json", "prose\n" * 90)


@_refused(r'x\.json, element 1: must be a JSON object with "text"')
def array_of_strings(folder: Path) -> Path:
    return _put(folder / "x.json", json.dumps(DOCUMENTS))


@_refused(r'x\.jsonl, line 1: must be a JSON object with "text"; it has id, content')
def another_field(folder: Path) -> Path:
    return _put(folder / "x.jsonl", '{"id": 1, "content": "a"}\n' * 90)


@_refused(r'x\.json, element 3: "text" must be a string, got NoneType')
def a_null(folder: Path) -> Path:
    return _put(folder / "x.json", json.dumps([*ROWS[:2], {"text": None}]))


@_refused(r"x\.jsonl holds half a surrogate pair \('\\ud800'\)")
def half_a_surrogate_pair(folder: Path) -> Path:
    return _put(folder / "x.jsonl", LINES + '{"text": "\\ud800"}\n')


@_refused(r"x\.jsonl, line 1: must be a JSON object")
def nested_too_deep(folder: Path) -> Path:
    return _put(folder / "x.jsonl", '{"text": ' + "[" * 200_000)


@_refused(r'x\.csv: a table needs a column "text"; it has id, body')
def table_without_text(folder: Path) -> Path:
    return _put(folder / "x.csv", "id,body\n" * 90)


@_refused(r"x\.csv, line 3: 3 columns, the first line has 2; quote cells")
def table_with_another_width(folder: Path) -> Path:
    return _put(folder / "x.csv", "id,text\n1,one\n2,two,three\n")


@_refused(r"x\.csv, line \d+: no whole table")
def table_with_an_open_quote(folder: Path) -> Path:
    return _put(folder / "x.csv", 'id,text\n1,"one\n')


@_refused(r"x\.parquet is no Parquet file")
def prose_named_parquet(folder: Path) -> Path:
    return _put(folder / "x.parquet", "prose\n" * 90)


@_refused(r"x\.parquet is damaged or truncated Parquet")
def truncated_parquet(folder: Path) -> Path:
    whole = parquet(folder).read_bytes()
    return _put(folder / "x.parquet", whole[: len(whole) // 2])


@_refused(r'x\.parquet: Parquet needs a column "text"; it has content')
def parquet_without_text(folder: Path) -> Path:
    return _parquet(folder / "x.parquet", content=list(DOCUMENTS))


@_refused(r'x\.parquet, row 1: "text" must be a string, got int')
def parquet_of_numbers(folder: Path) -> Path:
    return _parquet(folder / "x.parquet", text=[1, 2])


@_refused(r"x\.jsonl\.gz is damaged or truncated \(gzip: .*copy it again")
def truncated_gzip(folder: Path) -> Path:
    return _put(folder / "x.jsonl.gz", gzip.compress(LINES.encode())[:-20])


@_refused(r"x\.txt\.gz is gzip that was compressed once more, which is not read; unpack it")
def gzip_in_gzip(folder: Path) -> Path:
    return _put(folder / "x.txt.gz", gzip.compress(gzip.compress(LINES.encode())))


@_refused(r"x\.docx is a zip archive, which is not read; unpack it")
def a_zip(folder: Path) -> Path:
    return _put(folder / "x.docx", b"PK\x03\x04 and more")


@_refused(r"x\.jsonl\.zst is packed by zstandard, which is not read; unpack it, or pack it by gzip")
def zstandard(folder: Path) -> Path:
    return _put(folder / "x.jsonl.zst", b"\x28\xb5\x2f\xfd and more")


@_refused(r"x\.pdf is a PDF, which is not read; give its text")
def a_pdf(folder: Path) -> Path:
    return _put(folder / "x.pdf", b"%PDF-1.7\n")


@_refused(r"x\.txt is UTF-16 or UTF-32, which is not read; convert it to UTF-8")
def utf_16(folder: Path) -> Path:
    return _put(folder / "x.txt", JOINED.encode("utf-16"))


@_refused(r"x\.tar\.gz is a tar archive, which is not read; unpack it and give the folder")
def a_tar(folder: Path) -> Path:
    import tarfile

    _put(folder / "a.txt", JOINED)
    with tarfile.open(folder / "x.tar.gz", "w:gz") as archive:
        archive.add(folder / "a.txt", "a.txt")
    return folder / "x.tar.gz"


@_refused(r"has test\.jsonl but not calibration\.txt, search\.txt")
def one_split_of_lines(folder: Path) -> Path:
    _put(folder / "test.jsonl", LINES)
    return folder


@_refused(r"has test\.jsonl and test\.txt; give one of them")
def one_split_twice(folder: Path) -> Path:
    _put(folder / "test.jsonl", LINES)
    _put(folder / "test.txt", JOINED)
    return folder


@_refused(r"x is no regular file; it is read several times, so write it to one")
def a_pipe(folder: Path) -> Path:
    import os

    os.mkfifo(folder / "x")
    return folder / "x"
