"""The fingerprint of a checkpoint: sha256 over its configuration and its weights as stored."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from was_search.checkpoints.files import ModelSource, read_config
from was_search.checkpoints.plan_checkpoint import KEY, is_plan_config
from was_search.errors import ModelError

_VOLATILE = ("transformers_version", "_name_or_path")
"""Configuration keys that do not change what the model computes."""

_FILE_NAME = "fingerprints.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(source: ModelSource, cache_folder: Path | None = None) -> str:
    """sha256 as 64 hex digits over ``config.json`` (volatile keys left out) and every safetensors file of the model.

    The configuration counts by its values, not by its layout, and without what it says of a plan; a weight file counts
    by its name and bytes, and only files that are loaded count. A file's own hash is remembered in ``cache_folder`` by
    path, size and times of modification and change, so that a second call does not read the weights again; None
    remembers nothing, and what cannot be read or written there is ignored.

    Raises:
        ModelError: a file cannot be read.
    """
    config = {key: value for key, value in read_config(source).items() if key not in _VOLATILE}
    if is_plan_config(config):
        del config[KEY]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    remembered = {} if cache_folder is None else _read(cache_folder)
    known = dict(remembered)
    for path in source.weight_files():
        digest.update(path.name.encode() + b"\0" + _file_hash(path, known).encode())
    if cache_folder is not None and known != remembered:
        _write(cache_folder, known)
    return digest.hexdigest()


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
        temporary.write_text(json.dumps(known))
        temporary.replace(folder / _FILE_NAME)
    except OSError:
        return  # only a cache: without it the weights are read again
