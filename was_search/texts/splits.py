"""Text for the three splits: from a file, a folder, or a named data set. The splits never overlap.

- A folder with files called ``calibration``, ``search`` and ``test``, such as ``test.txt`` or ``test.jsonl.gz``, holds
  the splits.
- Any other folder: its files of the kinds of :mod:`was_search.texts.documents`, sorted by path, are joined by line ends
  and split like one file. Hidden files and folders and blank files are passed over, and so are, which is said, those of
  other kinds.
- One file is cut at line ends into 40 % calibration, 30 % search and 30 % test of its characters, in this order.
- What a file holds is decided by its content: see :mod:`was_search.texts.documents`.
- ``wikitext2``, ``c4`` and ``alpaca``: see :mod:`was_search.texts.named`. A file or folder of that name comes first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from was_search.errors import DataError
from was_search.process.close_names import did_you_mean, did_you_mean_path
from was_search.process.home import expanded, no_home
from was_search.texts.documents import READ_SUFFIXES, NoTextError, Reading, is_read, read_file, stem
from was_search.texts.protocol import SPLITS

NAMED = ("wikitext2", "c4", "alpaca")
"""The data sets known by name."""

_MAY_BE_DATA = (".json", ".csv", ".tsv")
"""Ends of names of files in a folder of texts that may hold anything: without ``text`` they are passed over."""

_SHARES = {"calibration": (0.0, 0.4), "search": (0.4, 0.7), "test": (0.7, 1.0)}


@dataclass(frozen=True)
class SplitText:
    """The text of one split.

    Attributes:
        name: the file, folder or data set, without parent folders.
        split: ``calibration``, ``search`` or ``test``.
        text: the split's text.
        kind: what it was read from, such as ``500 documents of JSON lines``; "" for plain text.
    """

    name: str
    split: str
    text: str
    kind: str = ""

    @cached_property
    def sha256(self) -> str:
        """sha256 of the text's UTF-8 bytes, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def is_named(source: str) -> bool:
    """Whether :func:`load_text` takes ``source`` for a named data set, which may have to be downloaded."""
    return source in NAMED and not expanded(source).exists()


def load_text(source: str, split: str) -> SplitText:
    """The text of ``split`` of ``source``: a text file, a folder, or a named data set.

    Raises:
        DataError: nothing there, an empty or damaged file or one of a kind that is not read, a folder without text,
            text too short to be cut, two splits with the same text, or a named data set that cannot be loaded.
    """
    if split not in SPLITS:
        raise DataError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
    path = expanded(source)
    if is_named(source):
        from was_search.texts.named import load_named

        return SplitText(source, split, load_named(source, split))
    if path.is_dir():
        found = _from_folder(path, split)
        return SplitText(path.resolve().name, split, found.text, found.kind)
    if path.exists():
        found = _filled(path)
        return SplitText(path.name, split, _cut(found.text, split, path), found.kind)
    raise DataError(
        f"data: must be a text file, a folder or one of {', '.join(NAMED)}, got {source!r}, which does not exist"
        f"{no_home(source)}{did_you_mean(source, NAMED) or did_you_mean_path(path)}"
    )


def _from_folder(folder: Path, split: str) -> Reading:
    own = _split_files(folder)
    if len(own) == len(SPLITS):
        return _from_split_files(folder, own, split)
    if own:
        there = ", ".join(path.name for path in own.values())
        missing = ", ".join(f"{name}.txt" for name in SPLITS if name not in own)
        raise DataError(f"data: {folder} has {there} but not {missing}; give all three, or none and other files")
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder)),
        key=lambda path: path.relative_to(folder).parts,
    )
    readings = {path: found for path in files if is_read(path) and (found := _in_folder(path)) is not None}
    if not readings:
        raise DataError(f"data: {folder} holds no text files ({', '.join('*' + s for s in READ_SUFFIXES)})")
    filled = {path: found for path, found in readings.items() if found.text.strip()}
    if not filled:
        raise DataError(f"data: the text files of {folder} are empty")
    over = [str(path.relative_to(folder)) for path in files if path not in readings]
    text = "\n".join(found.text for found in filled.values())
    return Reading(_cut(text, split, folder), _folder_kind(list(filled.values()), over))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _in_folder(path: Path) -> Reading | None:
    """What is read of one file among others; None for data of another sort that lies beside the texts."""
    try:
        return read_file(path)
    except NoTextError:
        if path.suffix.lower() not in _MAY_BE_DATA:
            raise
        return None


def _folder_kind(readings: list[Reading], over: list[str]) -> str:
    kinds = list(dict.fromkeys(found.kind for found in readings if found.kind))
    shown = f"{len(readings)} file{'s' * (len(readings) != 1)}" + "".join(f", {kind}" for kind in kinds[:3])
    shown += ", ..." if len(kinds) > 3 else ""
    return shown + (f"; not read: {over[0]}" + (f" and {len(over) - 1} more" if over[1:] else "") if over else "")


def _split_files(folder: Path) -> dict[str, Path]:
    """The folder's files that are called after splits."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = stem(path)
        if name not in SPLITS or not is_read(path) or not path.is_file():
            continue
        if name in found:
            raise DataError(f"data: {folder} has {found[name].name} and {path.name}; give one of them")
        found[name] = path
    return found


def _from_split_files(folder: Path, own: dict[str, Path], split: str) -> Reading:
    readings = {name: _filled(own[name]) for name in SPLITS}
    for i, name in enumerate(SPLITS):
        for other in SPLITS[:i]:
            if readings[name].text == readings[other].text:
                raise DataError(
                    f"data: {own[other].name} and {own[name].name} of {folder} hold the same text; "
                    "splits must not overlap"
                )
    return readings[split]


def _filled(path: Path) -> Reading:
    found = read_file(path)
    if not found.text.strip():
        raise DataError(f"data: {path} is empty")
    return found


def _cut(text: str, split: str, path: Path) -> str:
    ends = {share: _line_end(text, share) for share in sorted({s for pair in _SHARES.values() for s in pair})}
    for name, (start, end) in _SHARES.items():
        if not text[ends[start] : ends[end]].strip():
            raise DataError(
                f"data: {path} cannot be cut at line ends into three splits, the {name} split would be empty "
                f"({len(text)} characters in {len(text.splitlines())} lines); give more text"
            )
    first, last = _SHARES[split]
    return text[ends[first] : ends[last]]


def _line_end(text: str, share: float) -> int:
    """Position just after the first line end at or after ``share`` of the text."""
    if share in (0.0, 1.0):
        return int(share) * len(text)
    found = text.find("\n", int(share * len(text)))
    return len(text) if found < 0 else found + 1
