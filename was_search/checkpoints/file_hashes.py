"""The sha256 of large files, remembered so that a second question does not read them again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from was_search.errors import ModelError
from was_search.process.plain_json import dumps

_FILE_NAME = "fingerprints.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_hashes(paths: list[Path], cache_folder: Path | None = None) -> list[str]:
    """sha256 of each file, 64 hex digits.

    They are remembered in ``cache_folder`` by path, size and times of modification and change; None remembers nothing,
    and what cannot be read or written there is ignored.

    Raises:
        ModelError: a file cannot be read.
    """
    remembered = {} if cache_folder is None else _read(cache_folder)
    known = dict(remembered)
    found = [_file_hash(path, known) for path in paths]
    if cache_folder is not None and known != remembered:
        _write(cache_folder, known)
    return found


def _file_hash(path: Path, known: dict[str, str]) -> str:
    try:
        real = path.resolve()
        stat = real.stat()
        # What keeps its time of modification (cp -p, rsync -t) has another time of change.
        key = f"{real}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        if key not in known:
            with real.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model: {path} cannot be read ({error.strerror})") from error
    return known[key]


def _read(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / _FILE_NAME).read_bytes())
        return {key: value for key, value in found.items() if _SHA256.fullmatch(value)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(folder: Path, known: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_FILE_NAME}.{os.getpid()}.tmp"
        temporary.write_text(dumps(known))
        temporary.replace(folder / _FILE_NAME)
    except OSError:
        return  # only a cache: without it the weights are read again
