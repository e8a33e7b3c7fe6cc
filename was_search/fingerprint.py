"""The fingerprint of a checkpoint: sha256 over its configuration and its weights as stored."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from was_search.errors import ModelError
from was_search.model import ModelSource

_VOLATILE = ("transformers_version", "_name_or_path")
"""Configuration keys that do not change what the model computes."""


def fingerprint(source: ModelSource, cache_folder: Path) -> str:
    """sha256 as 64 hex digits over ``config.json`` (volatile keys left out) and every safetensors file.

    A file's own hash is remembered in ``cache_folder`` by path, size and modification time, so that a second
    call does not read the weights again.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((source.folder / "config.json").read_bytes())
        plain = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(json.dumps(plain, sort_keys=True).encode())
        remembered = _read(cache_folder)
        known = dict(remembered)
        for path in source.weight_files():
            digest.update(path.name.encode() + b"\0" + _file_hash(path, known).encode())
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {source.folder} cannot be read ({error})") from error
    if known != remembered:
        _write(cache_folder, known)
    return digest.hexdigest()


def _file_hash(path: Path, known: dict[str, str]) -> str:
    real = path.resolve()
    stat = real.stat()
    key = f"{real}:{stat.st_size}:{stat.st_mtime_ns}"
    if key not in known:
        with real.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[key]


def _read(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / "fingerprints.json").read_text())
        return {str(k): str(v) for k, v in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(folder: Path, known: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".fingerprints.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(known))
        temporary.replace(folder / "fingerprints.json")
    except OSError:
        return  # only a cache: without it the weights are read again
