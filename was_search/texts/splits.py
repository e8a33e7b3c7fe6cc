"""Text for the three splits: from a file, a folder, or a named data set. The splits never overlap.

- A folder with ``calibration.txt``, ``search.txt`` and ``test.txt`` holds the splits.
- Any other folder: its ``*.txt``, ``*.md``, ``*.py`` and ``*.jsonl`` files, sorted by path, are joined by line ends
  and split like one file. Hidden files and folders and blank files are passed over.
- One file is cut at line ends into 40 % calibration, 30 % search and 30 % test of its characters, in this order.
- Of a ``*.jsonl`` file the text is each line's ``"text"``, joined by blank lines.
- ``wikitext2``, ``c4`` and ``alpaca``: see :mod:`was_search.texts.named`. A file or folder of that name comes first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from was_search.errors import DataError
from was_search.process.close_names import did_you_mean, did_you_mean_path
from was_search.texts.protocol import SPLITS

NAMED = ("wikitext2", "c4", "alpaca")
"""The data sets known by name."""

_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_SHARES = {"calibration": (0.0, 0.4), "search": (0.4, 0.7), "test": (0.7, 1.0)}


@dataclass(frozen=True)
class SplitText:
    """The text of one split.

    Attributes:
        name: the file, folder or data set, without parent folders.
        split: ``calibration``, ``search`` or ``test``.
        text: the split's text.
    """

    name: str
    split: str
    text: str

    @cached_property
    def sha256(self) -> str:
        """sha256 of the text's UTF-8 bytes, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(source: str, split: str) -> SplitText:
    """The text of ``split`` of ``source``: a text file, a folder, or a named data set.

    Raises:
        DataError: nothing there, an empty or binary file, text that is not UTF-8, a folder without text, text too
            short to be cut, two splits with the same text, or a named data set that cannot be loaded.
    """
    if split not in SPLITS:
        raise DataError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source).expanduser()
    if source in NAMED and not path.exists():
        from was_search.texts.named import load_named

        return SplitText(source, split, load_named(source, split))
    if path.is_dir():
        return SplitText(path.resolve().name, split, _from_folder(path, split))
    if path.exists():
        text = _read(path)
        if not text.strip():
            raise DataError(f"data: {path} is empty")
        return SplitText(path.name, split, _cut(text, split, path))
    raise DataError(
        f"data: must be a text file, a folder or one of {', '.join(NAMED)}, got {source!r}, which does not exist"
        f"{did_you_mean(source, NAMED) or did_you_mean_path(path)}"
    )


def _from_folder(folder: Path, split: str) -> str:
    present = [name for name in SPLITS if (folder / f"{name}.txt").is_file()]
    if len(present) == len(SPLITS):
        return _from_split_files(folder, split)
    if present:
        there = ", ".join(f"{name}.txt" for name in present)
        missing = ", ".join(f"{name}.txt" for name in SPLITS if name not in present)
        raise DataError(f"data: {folder} has {there} but not {missing}; give all three, or none and other files")
    files = sorted(
        (path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file()),
        key=lambda path: path.relative_to(folder).parts,
    )
    files = [path for path in files if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if not files:
        raise DataError(f"data: {folder} holds no text files ({', '.join('*' + s for s in _SUFFIXES)})")
    text = "\n".join(content for content in map(_read, files) if content.strip())
    if not text:
        raise DataError(f"data: the text files of {folder} are empty")
    return _cut(text, split, folder)


def _from_split_files(folder: Path, split: str) -> str:
    texts = {name: _read(folder / f"{name}.txt") for name in SPLITS}
    for i, name in enumerate(SPLITS):
        if not texts[name].strip():
            raise DataError(f"data: {folder / f'{name}.txt'} is empty")
        for other in SPLITS[:i]:
            if texts[name] == texts[other]:
                raise DataError(
                    f"data: {other}.txt and {name}.txt of {folder} hold the same text; splits must not overlap"
                )
    return texts[split]


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"data: {path} cannot be read ({error.strerror})") from error
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(f"data: {path} is a binary file, not text (NUL at byte {zero})")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    text = text.removeprefix("\ufeff")
    return _json_lines(text, path) if path.suffix == ".jsonl" else text


def _json_lines(text: str, path: Path) -> str:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'data: {path}, line {number}: must be a JSON object with "text"') from error
        if not isinstance(found[-1], str):
            raise DataError(f'data: {path}, line {number}: "text" must be a string, got {type(found[-1]).__name__}')
    return "\n\n".join(found)


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
