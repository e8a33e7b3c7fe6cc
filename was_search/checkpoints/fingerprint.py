"""The fingerprint of a checkpoint: sha256 over its configuration and its weights as stored."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from was_search.checkpoints.file_hashes import file_hashes
from was_search.checkpoints.files import ModelSource, read_config
from was_search.checkpoints.plan_checkpoint import KEY, is_plan_config

_VOLATILE = ("transformers_version", "_name_or_path")
"""Configuration keys that do not change what the model computes."""


def fingerprint(source: ModelSource, cache_folder: Path | None = None) -> str:
    """sha256 as 64 hex digits over ``config.json`` (volatile keys left out) and every safetensors file of the model.

    The configuration counts by its values, not by its layout, and without what it says of a plan; a weight file counts
    by its name and bytes, and only files that are loaded count. :func:`was_search.checkpoints.file_hashes.file_hashes`
    remembers the files' hashes in ``cache_folder``.

    Raises:
        ModelError: a file cannot be read.
    """
    config = {key: value for key, value in read_config(source).items() if key not in _VOLATILE}
    if is_plan_config(config):
        del config[KEY]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    files = source.weight_files()
    for path, own in zip(files, file_hashes(files, cache_folder), strict=True):
        digest.update(path.name.encode() + b"\0" + own.encode())
    return digest.hexdigest()
