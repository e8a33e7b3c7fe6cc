"""Text for the three splits: from a file, a folder, or a named data set. The splits never overlap.

- A folder with ``calibration.txt``, ``search.txt`` and ``test.txt`` holds the splits.
- Any other folder: its ``*.txt``, ``*.md`` and ``*.py`` files, sorted by path, are joined and split like one file.
- One file is cut at line ends into 40 % calibration, 30 % search and 30 % test, in this order.
- ``wikitext2``, ``c4`` and ``alpaca``: see :mod:`was_search.datasets_named`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from was_search.errors import DataError
from was_search.protocol import SPLITS

NAMED = ("wikitext2", "c4", "alpaca")
_SUFFIXES = (".txt", ".md", ".py")
_SHARES = {"calibration": (0.0, 0.4), "search": (0.4, 0.7), "test": (0.7, 1.0)}


@dataclass(frozen=True)
class SplitText:
    """The text of one split; ``name`` is the source without folders."""

    name: str
    split: str
    text: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(source: str, split: str) -> SplitText:
    """The text of ``split`` of ``source``: a file, a folder or a named data set.

    Raises:
        DataError: nothing there, an empty or binary file, text that is not UTF-8, an unknown split, or a named
            data set that cannot be loaded.
    """
    if split not in SPLITS:
        raise DataError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source).expanduser()
    if source in NAMED and not path.exists():
        from was_search.datasets_named import load_named

        return SplitText(source, split, load_named(source, split))
    if path.is_dir():
        return _from_folder(path, split)
    if path.is_file():
        return SplitText(path.name, split, _cut(_read(path), split, path))
    raise DataError(
        f"data: {source!r} is no file, no folder and none of the named data sets {', '.join(NAMED)}"
    )


def _from_folder(folder: Path, split: str) -> SplitText:
    present = [name for name in SPLITS if (folder / f"{name}.txt").is_file()]
    if len(present) == len(SPLITS):
        return SplitText(folder.name, split, _read(folder / f"{split}.txt"))
    if present:
        missing = ", ".join(f"{name}.txt" for name in SPLITS if name not in present)
        raise DataError(f"data: {folder} has {', '.join(f'{n}.txt' for n in present)} but not {missing}")
    files = sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"data: {folder} holds no text files ({', '.join('*' + s for s in _SUFFIXES)})")
    text = "\n".join(content for content in (_decode(p.read_bytes(), p) for p in files) if content.strip())
    if not text.strip():
        raise DataError(f"data: the text files of {folder} are empty")
    return SplitText(folder.name, split, _cut(text, split, folder))


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"data: {path} cannot be read ({error.strerror})") from error
    text = _decode(raw, path)
    if not text.strip():
        raise DataError(f"data: {path} is empty")
    return text


def _decode(raw: bytes, path: Path) -> str:
    if b"\0" in raw[:65536]:
        raise DataError(f"data: {path} is a binary file, not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it first") from error


def _cut(text: str, split: str, path: Path) -> str:
    start, end = (_line_end(text, share) for share in _SHARES[split])
    part = text[start:end]
    if not part.strip():
        raise DataError(f"data: {path} is too short to be cut into three splits; the {split} split is empty")
    return part


def _line_end(text: str, share: float) -> int:
    """Position just behind the line end nearest after ``share`` of the text."""
    if share in (0.0, 1.0):
        return int(share * len(text))
    found = text.find("\n", int(share * len(text)))
    return len(text) if found < 0 else found + 1
