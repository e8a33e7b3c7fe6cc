"""A checkpoint's files: in a local folder, in a GGUF file, or on the hub by id. Pickles are never loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from was_search.checkpoints.column_layout import COLUMNS_NAME, ColumnLayout
from was_search.checkpoints.gguf_checkpoint import SUFFIX, gguf_folder, is_gguf
from was_search.checkpoints.limits import check_values
from was_search.errors import ModelError, reason
from was_search.process.close_names import did_you_mean_path
from was_search.process.home import expanded, no_home
from was_search.process.regular_files import read_regular

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_ENTRY = re.compile(r"[\w-][\w.-]*\.safetensors(?:\.index\.json)?", re.ASCII)
_VARIANT = re.compile(r"model\.[\w-]+\.safetensors(?:\.index\.json)?", re.ASCII)
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-.*\.safetensors", re.ASCII)
_CONFIG = re.compile(r"config\.[\w.-]+\.json", re.ASCII)
_MAX_JSON_BYTES = 64 << 20
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".bpe", ".codes", ".vocab")
_NOT_TOKENIZERS = re.compile(r"config\.(.*\.)?json|.*\.index\.json|(generation|preprocessor)_config\.json|plan\.json")
_TOKENIZER_KEYS = ("model_type", "tokenizer_class")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        display_name: without folders.
        folder: the checkpoint's files, for a hub id its snapshot in the local cache.
        revision: the hub's commit; "" for a folder.
        columns: where the weights lie if they are stored column-major, beside a plan; None for a plain checkpoint.
        file: the GGUF file that the folder was written from; None for a checkpoint.
    """

    name: str
    display_name: str
    folder: Path
    revision: str
    columns: ColumnLayout | None = None
    file: Path | None = None

    @property
    def location(self) -> str:
        """What to resolve on another machine: the folder of a local checkpoint, a GGUF file, else the hub id."""
        return self.name if self.revision else str(self.file or self.folder)

    def tokenizer_hash(self) -> str:
        """sha256 over all files from which a tokenizer may be read, and what the configuration says of it."""
        digest = hashlib.sha256()
        config = read_config(self)
        digest.update(json.dumps([str(config.get(key)) for key in _TOKENIZER_KEYS]).encode())
        for path in self.tokenizer_files():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """The files from which a tokenizer may be read, by name: which ones depends on its class and its files."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix in _TOKENIZER_SUFFIXES
            and path.name != COLUMNS_NAME
            and not _NOT_TOKENIZERS.fullmatch(path.name)
            and path.is_file()
        )

    def weights_entry(self) -> Path | None:
        """The file from which the weights are found: one file with all of them, or the index of their shards.

        It is the one that transformers takes: that which the configuration names, ``model.safetensors``, or else its
        index. None where there is none of these.

        Raises:
            ModelError: the configuration names what is no such file of the folder.
        """
        named = read_config(self).get("transformers_weights")
        if named is not None:
            if not isinstance(named, str) or not _ENTRY.fullmatch(named):
                raise ModelError(
                    f"model: {self.folder / 'config.json'}: transformers_weights must name a safetensors file or index "
                    f"of the folder, got {str(named)[:80]!r}"
                )
            return self.folder / named
        return next((self.folder / name for name in (_WEIGHTS, _INDEX) if (self.folder / name).is_file()), None)

    def weight_files(self) -> list[Path]:
        """The safetensors files of the weights, by name: the very ones that are loaded, plain or column-major.

        Raises:
            ModelError: the index cannot be read, or names a file outside the folder.
        """
        if self.columns is not None:
            return [self.folder / name for name in sorted(set(self.columns.files.values()))]
        index = self.weights_entry()
        if index is None or not index.name.endswith(".json"):
            return [] if index is None else [index]
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
    """The source called ``name``: an existing folder, a GGUF file, else a hub id.

    A GGUF file is written out as a checkpoint and a hub id fetched, each into the local cache if it is not there.
    ``revision`` is the hub's; a folder has none. Checks that the files are whole, without reading the weights, and that
    the configuration holds nothing that :func:`check_values` refuses.

    Raises:
        ModelError: no such folder or hub id, the hub cannot be reached, files are missing or truncated, or the
            configuration is refused.
        ResourceError: a GGUF file without the package ``gguf``, or without room for its checkpoint.
    """
    path = expanded(name)
    if path.exists():
        if not path.is_dir():
            return _from_gguf(name, path)
        return _checked(ModelSource(name, path.resolve().name, path.resolve(), ""))
    if not is_on_the_hub(name):
        raise ModelError(
            f"model: must be a checkpoint's folder, a GGUF file or a hub id, got {name!r}, which does not exist"
            f"{no_home(name)}{did_you_mean_path(path)}"
        )
    snapshot = _snapshot(name, revision)  # its folder is called after the commit
    return _checked(ModelSource(name, name.rsplit("/", 1)[-1], snapshot, snapshot.name))


def is_on_the_hub(name: str) -> bool:
    """Whether :func:`resolve_model` asks the hub for ``name``, which may take long."""
    named = _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(SUFFIX)
    return named and not expanded(name).exists()


def takes_long(name: str) -> str:
    """What :func:`resolve_model` does that may take long, in words; "" for a folder."""
    if is_on_the_hub(name):
        return f"fetch {name} from the hub"
    return f"read {Path(name).name}" if expanded(name).is_file() else ""


def _from_gguf(name: str, path: Path) -> ModelSource:
    if not is_gguf(path):
        raise ModelError(f"model: {path} is a file, and no GGUF; give the checkpoint's folder")

    def source(folder: Path) -> ModelSource:
        return _checked(ModelSource(name, path.stem, folder, "", file=path.resolve()))

    folder = gguf_folder(path)
    try:
        return source(folder)
    except ModelError:  # as where a machine went down soon after it was written
        return source(gguf_folder(path, anew=True))


def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    options: dict[str, Any] = {
        "revision": revision or None,
        "allow_patterns": ["*.json", "model*.safetensors", "*.model", "*.txt", "*.tiktoken"],
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
        raise ModelError(f"model: {folder} has no config.json; {_instead_of(folder)}")
    check_values(folder, read_config(source))
    if (folder / COLUMNS_NAME).is_file():
        source = dataclasses.replace(source, columns=_columns(folder / COLUMNS_NAME))
    elif distributed := sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name)):
        raise ModelError(
            f"model: {folder} holds a checkpoint of distributed training ({distributed[0]}), which is read in place of "
            "other weights; load it there and save it with save_pretrained"
        )
    files = source.weight_files()
    if not files:
        raise ModelError(f"model: {folder} has no weights ({_WEIGHTS} or {_INDEX}){_other_weights(folder)}")
    for path in files:
        if not path.is_file():
            index = COLUMNS_NAME if source.columns else _names_it(source, path)
            raise ModelError(f"model: {path} is missing, though {index} names it; copy the checkpoint again")
        try:
            with safe_open(path, framework="numpy"):  # reads the header and compares it with the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model: {path} is damaged or truncated ({error}); copy the checkpoint again") from error
    return source


def _names_it(source: ModelSource, path: Path) -> str:
    entry = source.weights_entry()
    return "config.json" if entry is None or entry == path else entry.name


def _instead_of(folder: Path) -> str:
    """What to give in place of a folder without a configuration."""
    if (folder / "adapter_config.json").exists():
        return "an adapter: merge it into its base model first"
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    return f"give {inside[0]}, which has one" if inside else "give the folder of a transformers checkpoint"


def _other_weights(folder: Path) -> str:
    """What lies there in place of weights, and what to do about it."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if _VARIANT.fullmatch(name):
            return f"; {name} is a variant, which is read by no default: load it with its variant and save it without"
    for name in names:
        if Path(name).suffix in _PICKLED:
            return f"; {name} is pickled, which is never loaded: convert it to safetensors"
    for name in names:
        if name.endswith(SUFFIX):
            return f"; {name} is GGUF: give that file, or the checkpoint that it was made of"
    inside = sorted(folder.glob(f"*/{_WEIGHTS}"))
    return f"; there are some in {inside[0].parent}" if inside else ""


def require_whole_index(source: ModelSource) -> None:
    """Refuse an index that transformers does not take.

    Raises:
        ModelError: it has no metadata.
    """
    entry = None if source.columns is not None else source.weights_entry()
    if entry is not None and entry.name.endswith(".json") and not isinstance(_read_json(entry).get("metadata"), dict):
        raise ModelError(f'model: {entry} has no "metadata", which transformers asks for; add "metadata": {{}} to it')


def _columns(path: Path) -> ColumnLayout:
    try:
        document = _read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {path} cannot be read ({error})") from error
    return ColumnLayout.from_json(document, path)


def read_config(source: ModelSource) -> dict[str, Any]:
    """The checkpoint's ``config.json``, or the file for this release of transformers that it names.

    Raises:
        ModelError: it is not a JSON object, or names no file of the folder.
    """
    config = read_object(source.folder / "config.json")
    versions = config.get("configuration_files")
    if versions is None:
        return config
    from transformers.configuration_utils import get_configuration_file

    path = source.folder / "config.json"
    if not isinstance(versions, list) or not all(isinstance(v, str) and _CONFIG.fullmatch(v) for v in versions):
        raise ModelError(f"model: {path}: configuration_files must name files config.VERSION.json of the folder")
    try:
        chosen: str = get_configuration_file(versions)
    except Exception as error:
        raise ModelError(f"model: {path}: configuration_files cannot be read ({reason(error)})") from error
    return read_object(source.folder / chosen)


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
    """Read a JSON file; OSError or ValueError for no file, no JSON, too deep nesting or more than they ever hold."""
    content = read_regular(path, _MAX_JSON_BYTES)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
