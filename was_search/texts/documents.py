"""The text of one file by what is in it: plain text, or the documents of JSON, a table or Parquet, also compressed.

====================  =============================================================================================
read as               if
====================  =============================================================================================
Parquet               it begins as such a file does
JSON lines or array   it begins as an object or an array of objects does, or its name ends in .json, .jsonl, .ndjson
CSV, TSV              its first line names columns, one of them ``text``, or its name ends in .csv, .tsv
plain text            it is none of these, and UTF-8
====================  =============================================================================================

gzip, bzip2 and xz are unpacked first, whatever the name. Of documents the text is each one's ``text``, joined by blank
lines. A file that is none of these, or damaged, is refused: nothing is read as another kind because of its name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from was_search.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
"""Names of plain text that a folder is searched for, besides those of documents."""

JSON_SUFFIXES, TABLE_SUFFIXES, PARQUET_SUFFIX = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), ".parquet"
READ_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES, PARQUET_SUFFIX)
"""Ends of the names of files that a folder is searched for, in any case, and with one of a compression after them."""

_OBJECT = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:')
_ARRAY = re.compile(r"\s*\[\s*\{")
_COLUMN = re.compile(r"\w[\w.-]*")
_LONGEST_HEADER = 10_000
_DELIMITERS = (",", "\t", ";", "|")
_MOST_BYTES = 2 << 30
"""Of a file, and of what a compressed one holds: all of it is read into memory."""
_PACKED: dict[bytes, tuple[str, Callable[[BinaryIO], io.BufferedIOBase]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
}
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
_UNPACK = "unpack it"
_NOT_READ = {
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed by zstandard", f"{_UNPACK}, or pack it by gzip"),
    b"\x04\x22\x4d\x18": ("packed by lz4", f"{_UNPACK}, or pack it by gzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"%PDF-": ("a PDF", "give its text"),
    b"ARROW1\0\0": ("an Arrow file", "write it as Parquet"),
    b"\xff\xfe": ("UTF-16 or UTF-32", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it to UTF-8"),
    b"\0\0\xfe\xff": ("UTF-32", "convert it to UTF-8"),
}
_TAR_AT = 257


class NoTextError(DataError):
    """A whole file of documents, none of which is said to have a text."""


@dataclass(frozen=True)
class Reading:
    """What was read of a file.

    Attributes:
        text: all of it.
        kind: what it was read as, such as ``500 documents of JSON lines``; "" for plain text.
    """

    text: str
    kind: str = ""


def read_file(path: Path) -> Reading:
    """The text of the file at ``path``.

    Raises:
        NoTextError: JSON, a table or Parquet without ``text``.
        DataError: it cannot be read, is no regular file, is damaged, of a kind that is not read, or not UTF-8.
    """
    raw, packed = _unpacked(_bytes(path), path)
    name = _name_suffix(path)
    if raw.startswith(b"PAR1"):
        return _joined(_parquet(raw, path), f"Parquet{packed}", path)
    text = _decoded(raw, path)
    if name in JSON_SUFFIXES or _OBJECT.match(text) or _ARRAY.match(text):
        kind, found = _json(text, path)
        return _joined(found, kind + packed, path)
    delimiter = _delimiter(text, name)
    if name in TABLE_SUFFIXES or delimiter:
        return _joined(_table(text, delimiter, path), f"{'TSV' if delimiter == chr(9) else 'CSV'}{packed}", path)
    if name == PARQUET_SUFFIX and text.strip():
        raise DataError(f"data: {path} is no Parquet file; copy it again")
    return Reading(text, packed.removeprefix(" in "))


def is_read(path: Path) -> bool:
    """Whether a folder's file is read, by its name."""
    return _name_suffix(path) in READ_SUFFIXES


def stem(path: Path) -> str:
    """The file's name without what says its kind, in small letters: ``test`` of ``Test.JSONL.gz``."""
    name = path.name.lower()
    for ends in (_PACKED_SUFFIXES, READ_SUFFIXES):
        name = next((name.removesuffix(end) for end in ends if name.endswith(end)), name)
    return name


def _name_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _bytes(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise DataError(f"data: {path} is no regular file; it is read several times, so write it to one")
    try:
        _require_few(path.stat().st_size, path, "")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data: {path} cannot be read ({error.strerror})") from error


def _require_few(size: int, path: Path, unpacked: str) -> None:
    if size > _MOST_BYTES:
        raise DataError(
            f"data: {path} has more than {_MOST_BYTES >> 20} MiB{unpacked}, all of which would be read into memory; "
            "give a part of it"
        )


def _unpacked(raw: bytes, path: Path) -> tuple[bytes, str]:
    """What a compressed file holds, and `` in gzip`` or the like."""
    for start, (name, unpack) in _PACKED.items():
        if raw.startswith(start):
            try:
                found = unpack(io.BytesIO(raw)).read(_MOST_BYTES + 1)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"data: {path} is damaged or truncated ({name}: {error}); copy it again") from error
            _require_few(len(found), path, f" once it is unpacked ({name})")
            return found, f" in {name}"
    return raw, ""


def _decoded(raw: bytes, path: Path) -> str:
    for start, (what, remedy) in _NOT_READ.items():
        if raw.startswith(start):
            raise DataError(f"data: {path} is {what}, which is not read; {remedy}")
    for start, (name, _) in _PACKED.items():
        if raw.startswith(start):
            raise DataError(f"data: {path} is {name} that was compressed once more, which is not read; {_UNPACK}")
    if raw[_TAR_AT : _TAR_AT + 5] == b"ustar":
        raise DataError(f"data: {path} is a tar archive, which is not read; {_UNPACK} and give the folder")
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(f"data: {path} is a binary file, not text (NUL at byte {zero})")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _joined(documents: list[str], kind: str, path: Path) -> Reading:
    text = "\n\n".join(documents)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data: {path} holds half a surrogate pair ({text[error.start]!r}), which is no text; write it again"
        ) from error
    return Reading(text, f"{len(documents)} document{'s' * (len(documents) != 1)} of {kind}")


def _json(text: str, path: Path) -> tuple[str, list[str]]:
    """Documents of an array, of one object over several lines, or of JSON lines; and which of these it is."""
    whole = _loads(text) if text.lstrip()[:1] in ("[", "{") else None
    if isinstance(whole, list):
        return "a JSON array", [_document(each, f"{path}, element {i}", i == 1) for i, each in enumerate(whole, 1)]
    if text.lstrip().startswith("["):
        raise DataError(f"data: {path} is no whole JSON array; copy it again")
    if isinstance(whole, dict) and "\n" in text.strip():
        return "JSON", [_document(whole, str(path), True)]
    found: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(_document(_loads(line), f"{path}, line {number}", not found))
    return "JSON lines", found


def _loads(text: str) -> Any:
    """The value of JSON ``text``, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _document(value: Any, where: str, first: bool) -> str:
    if not isinstance(value, dict):
        raise DataError(f'data: {where}: must be a JSON object with "text"')
    if "text" not in value:
        kind = NoTextError if first else DataError
        raise kind(f'data: {where}: must be a JSON object with "text"; it has {_names(value)}')
    text = value["text"]
    if not isinstance(text, str):
        raise DataError(f'data: {where}: "text" must be a string, got {type(text).__name__}')
    return text


def _names(columns: Any) -> str:
    names = [str(name)[:40] for name in columns]
    shown = ", ".join(ascii(name)[1:-1] for name in names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown or "nothing"


def _delimiter(text: str, name: str) -> str:
    """What parts a table's columns, "" for text that is none: one column is ``text``, and all have plain names."""
    line = text.lstrip("\n\r")[:_LONGEST_HEADER].partition("\n")[0].partition("\r")[0]
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        if "text" in cells and (
            name in TABLE_SUFFIXES or (len(cells) > 1 and all(_COLUMN.fullmatch(cell) for cell in cells))
        ):
            return delimiter
    return ""


def _table(text: str, delimiter: str, path: Path) -> list[str]:
    if not text.strip():
        return []
    limit = csv.field_size_limit(len(text) + 1)
    try:
        rows = csv.reader(io.StringIO(text.lstrip("\n\r"), newline=""), delimiter=delimiter or ",", strict=True)
        header = next(rows)
        if "text" not in header:
            raise NoTextError(f'data: {path}: a table needs a column "text"; it has {_names(header)}')
        column, found = header.index("text"), []
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"data: {path}, line {rows.line_num}: {len(row)} columns, the first line has {len(header)}; "
                    "quote cells that hold the delimiter, or write it as JSON lines"
                )
            if row:
                found.append(row[column])
    except csv.Error as error:
        raise DataError(f"data: {path}, line {rows.line_num}: no whole table ({error}); write it again") from error
    finally:
        csv.field_size_limit(limit)
    return found


def _parquet(raw: bytes, path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise NoTextError(f'data: {path}: Parquet needs a column "text"; it has {_names(columns)}')
        found: list[str] = file.read(columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data: {path} is damaged or truncated Parquet ({_line(error)}); copy it again") from error
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise DataError(f'data: {path}, row {number}: "text" must be a string, got {type(text).__name__}')
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
