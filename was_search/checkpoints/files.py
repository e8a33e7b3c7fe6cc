"""A checkpoint's files: in a local folder, or on the hub by id. Only safetensors weights; pickles are never loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from was_search.checkpoints.column_layout import COLUMNS_NAME, ColumnLayout
from was_search.checkpoints.limits import check_values
from was_search.errors import ModelError
from was_search.process.close_names import did_you_mean_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_MAX_JSON_BYTES = 64 << 20
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        display_name: without folders.
        folder: the checkpoint's files, for a hub id its snapshot in the local cache.
        revision: the hub's commit; "" for a folder.
        columns: where the weights lie if they are stored column-major, beside a plan; None for a plain checkpoint.
    """

    name: str
    display_name: str
    folder: Path
    revision: str
    columns: ColumnLayout | None = None

    @property
    def location(self) -> str:
        """What to resolve on another machine: the folder of a local checkpoint, else the hub id."""
        return self.name if self.revision else str(self.folder)

    def tokenizer_hash(self) -> str:
        """sha256 over the tokenizer's files."""
        digest = hashlib.sha256()
        for name in self.tokenizer_files():
            path = self.folder / name
            if path.is_file():
                digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    @staticmethod
    def tokenizer_files() -> tuple[str, ...]:
        """Names that files of a tokenizer have."""
        return _TOKENIZER_FILES

    def weight_files(self) -> list[Path]:
        """The safetensors files of the weights, by name: those that transformers loads, or the column-major ones.

        Raises:
            ModelError: the index cannot be read, or names a file outside the folder.
        """
        if self.columns is not None:
            return [self.folder / name for name in sorted(set(self.columns.files.values()))]
        index = self.folder / _INDEX
        if not index.is_file():
            return [self.folder / _WEIGHTS] if (self.folder / _WEIGHTS).is_file() else []
        try:
            names = {str(name) for name in _read_json(index)["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"model: {index} cannot be read ({error!r}); copy the checkpoint again") from error
        for name in names:
            if not _SHARD.fullmatch(name):
                raise ModelError(
                    f"model: {index} names {name[:80]!r} as weights; only safetensors files of the folder are read"
                )
        return [self.folder / name for name in sorted(names)]


def resolve_model(name: str, revision: str = "") -> ModelSource:
    """The source called ``name``: an existing folder, else a hub id, fetched into the local cache if it is not there.

    ``revision`` is the hub's; a folder has none. Checks that the files are whole, without reading the weights, and that
    the configuration holds nothing that :func:`check_values` refuses.

    Raises:
        ModelError: no such folder or hub id, the hub cannot be reached, files are missing or truncated, or the
            configuration is refused.
    """
    path = Path(name).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError(f"model: {path} is a file; give the checkpoint's folder")
        return _checked(ModelSource(name, path.resolve().name, path.resolve(), ""))
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model: must be a checkpoint's folder or a hub id, got {name!r}, which does not exist"
            f"{did_you_mean_path(path)}"
        )
    snapshot = _snapshot(name, revision)  # its folder is called after the commit
    return _checked(ModelSource(name, name.rsplit("/", 1)[-1], snapshot, snapshot.name))


def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    options: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": ["*.json", "model*.safetensors", "tokenizer.model", "*.txt"],
        "ignore_patterns": ["*/*"],  # other formats of the same weights
    }
    try:
        try:
            return Path(snapshot_download(name, **options))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # without the hub, some versions give the cached files for a branch but not for a commit
            with suppress(Exception):
                return Path(snapshot_download(name, **options, local_files_only=True))
            raise
    except GatedRepoError as error:
        raise ModelError(
            f"model: {name} needs its licence accepted on the hub and a token ('hf auth login')"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model: {name} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model: no folder and no model on the hub is called {name!r}{did_you_mean_path(Path(name))}"
        ) from error
    except Exception as error:  # connection errors of several libraries
        raise ModelError(
            f"model: {name!r} is no local folder, is not in the local hub cache, and the hub cannot be reached "
            f"({reason(error)}); download it elsewhere and give its folder"
            f"{did_you_mean_path(Path(name))}"
        ) from error


def _checked(source: ModelSource) -> ModelSource:
    from safetensors import SafetensorError, safe_open

    folder = source.folder
    if not (folder / "config.json").is_file():
        hint = "an adapter: merge it into its base model first" if (folder / "adapter_config.json").exists() else ""
        raise ModelError(
            f"model: {folder} has no config.json; {hint or 'give the folder of a transformers checkpoint'}"
        )
    check_values(folder, read_config(source))
    if (folder / COLUMNS_NAME).is_file():
        source = dataclasses.replace(source, columns=_columns(folder / COLUMNS_NAME))
    files = source.weight_files()
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        hint = f"; {pickled[0]} is pickled, which is never loaded: convert it to safetensors" if pickled else ""
        raise ModelError(f"model: {folder} has no weights ({_WEIGHTS} or {_INDEX}){hint}")
    for path in files:
        if not path.is_file():
            index = COLUMNS_NAME if source.columns else _INDEX
            raise ModelError(f"model: {path} is missing, though {index} names it; copy the checkpoint again")
        try:
            with safe_open(path, framework="numpy"):  # reads the header and compares it with the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model: {path} is damaged or truncated ({error}); copy the checkpoint again") from error
    return source


def _columns(path: Path) -> ColumnLayout:
    try:
        document = _read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read ({error})") from error
    return ColumnLayout.from_json(document, path)


def read_config(source: ModelSource) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        ModelError: it is not a JSON object.
    """
    return read_object(source.folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ModelError: it is not a JSON object.
    """
    try:
        found = _read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"model: {path} must hold a JSON object, got {type(found).__name__}")
    return found


def _read_json(path: Path) -> Any:
    """Read a JSON file; OSError or ValueError for no JSON, too deep nesting or more than any configuration holds."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        content = file.read(size)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def reason(error: BaseException) -> str:
    """An error of another library as one short line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
