"""A folder with a plan and the weights as the sparse runtime reads them: projections column-major, ready to decode.

``columns.json`` says which tensors of which safetensors files are stored as ``[in_features, out_features]``. The files
have names of their own, so that nothing that reads checkpoints takes transposed weights for plain ones. The folder
holds all that decoding needs: configuration, tokenizer, plan and weights. It comes from anywhere, like a checkpoint:
names lead to no other file, and nothing in it is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.checkpoints.appearing import appearing
from was_search.errors import ConfigError, ModelError, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from was_search.checkpoints.files import ModelSource
    from was_search.plan import Plan

COLUMNS_NAME = "columns.json"
SCHEMA_VERSION = 1
SHARD_BYTES = 2 << 30

_SHARD = re.compile(r"columns-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DTYPES = ("float32", "bfloat16", "float16")
_COPIED = ("config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class ColumnLayout:
    """The content of ``columns.json``.

    Attributes:
        fingerprint: that of the weights' checkpoint, as in the plan.
        dtype: dtype of the weights.
        files: each tensor's safetensors file in the folder.
        columns: tensors that are stored transposed: [in_features, out_features].
    """

    fingerprint: str
    dtype: str
    files: dict[str, str]
    columns: frozenset[str]

    @classmethod
    def from_json(cls, document: Any, path: Path) -> ColumnLayout:
        """Read ``document``; raises a ModelError that names ``path`` for anything that is no such document."""

        def refuse(rule: str) -> ModelError:
            return ModelError(f"model: {path}: {rule}; export the plan with its weights again")

        if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
            raise refuse(f"schema_version must be {SCHEMA_VERSION}")
        files, columns = document.get("files"), document.get("columns")
        if not isinstance(files, dict) or not files:
            raise refuse("files must name the file of every tensor")
        for name in files.values():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise refuse(f"names {str(name)[:80]!r} as weights, only its own columns-*.safetensors are read")
        if not isinstance(columns, list) or not all(isinstance(name, str) and name in files for name in columns):
            raise refuse("columns must be names of tensors in files")
        if not _FINGERPRINT.fullmatch(str(document.get("fingerprint"))):
            raise refuse("fingerprint must be 64 hexadecimal digits")
        if document.get("dtype") not in _DTYPES:
            raise refuse(f"dtype must be one of {', '.join(_DTYPES)}")
        return cls(document["fingerprint"], document["dtype"], dict(files), frozenset(columns))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "files": self.files,
            "columns": sorted(self.columns),
        }


def save_columns(
    model: nn.Module, plan: Plan, source: ModelSource, folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write ``plan`` and the weights of ``model`` into ``folder``, to be loaded by ``was_kernels.load_sparse``.

    One shard at a time is held besides the model. ``columns.json`` is written last: a folder without it is not taken
    for a whole one.

    Args:
        model: a causal LM, dense, in the dtype to be stored.
        plan: for this model.
        source: the checkpoint that the model was loaded from; its configuration and tokenizer are copied.
        folder: made if missing; the files of an earlier call are replaced.
        shard_bytes: greatest size of a file, unless a single tensor is larger.

    Raises:
        PlanError: the plan belongs to another model, or the folder cannot be written.
        ModelError: the projections are not found, or their dtype is not one of the three.
        ConfigError: the folder is the checkpoint's own.
    """
    from safetensors.torch import save_file

    from was_search.checkpoints.structure import find_structure

    if folder.exists() and folder.resolve() == source.folder.resolve():
        raise ConfigError(f"plan: {folder} is the checkpoint's own folder; choose another")
    structure = find_structure(model, plan.shape.masks)
    plan.require_shape(structure.shape)
    own = {id(linear.weight) for masked in structure.inputs() for linear in masked.linears}
    tensors = dict(_tensors(model))
    columns = frozenset(name for name, tensor in tensors.items() if id(tensor) in own)
    dtype = str(tensors[next(iter(columns))].dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ModelError(f"model: weights of dtype {', '.join(_DTYPES)} can be stored, got {dtype}")
    shards = _shards(tensors, shard_bytes)
    files = {
        name: f"columns-{i:05d}-of-{len(shards):05d}.safetensors"
        for i, shard in enumerate(shards, start=1)
        for name in shard
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COLUMNS_NAME).unlink(missing_ok=True)
        for shard in shards:
            laid = {
                name: (tensors[name].detach().t() if name in columns else tensors[name].detach()).contiguous().cpu()
                for name in shard
            }
            with appearing(folder / files[shard[0]]) as temporary:
                save_file(laid, temporary, metadata={"format": "pt"})
            del laid
        for stale in folder.glob("columns-*.safetensors"):
            if stale.name not in files.values():
                stale.unlink()
        for name in (*_COPIED, *(path.name for path in source.tokenizer_files())):
            if (source.folder / name).is_file():
                with appearing(folder / name) as temporary:
                    shutil.copyfile(source.folder / name, temporary)
        plan.save(folder)
        layout = ColumnLayout(plan.fingerprint, dtype, files, columns)
        with appearing(folder / COLUMNS_NAME) as temporary:
            temporary.write_text(json.dumps(layout.to_json(), indent=1) + "\n")
    except OSError as error:
        raise PlanError(f"plan: cannot write {folder} ({error.strerror}); choose another folder") from error
    return folder


def column_state(source: ModelSource) -> dict[str, Tensor]:
    """The tensors of a folder of :func:`save_columns` by name, mapped from its files and not read yet.

    Those stored transposed come as their transposed views: [out_features, in_features], column-major.

    Raises:
        ModelError: a tensor is not in the file that should hold it, or has not two dimensions where it must.
    """
    from safetensors import safe_open

    layout = source.columns
    if layout is None:
        raise ModelError(f"model: {source.folder} holds no column-major weights")
    state: dict[str, Tensor] = {}
    for path in source.weight_files():
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            for name in (name for name, shard in layout.files.items() if shard == path.name):
                if name not in there:
                    raise ModelError(f"model: {path} does not hold {name[:80]!r}; copy the folder again")
                tensor: Tensor = file.get_tensor(name)
                if name in layout.columns and tensor.dim() != 2:
                    raise ModelError(f"model: {path}: {name[:80]!r} must be a matrix; export the plan again")
                state[name] = tensor.t() if name in layout.columns else tensor
    return state


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name; only the first of tied ones."""
    seen: set[int] = set()
    kept = set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
