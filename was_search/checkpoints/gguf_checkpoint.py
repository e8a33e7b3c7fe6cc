"""GGUF files as ordinary checkpoints: written out in bfloat16 once, and kept.

transformers reads the file (it needs the package ``gguf`` for that) and writes its weights out, whatever they were
rounded to. The folder lies in was-search's cache under the sha256 of the file, which so decides the fingerprint: a
later use neither converts again nor needs the package.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any

from was_search.checkpoints.appearing import appearing, appearing_folder, remove_unfinished
from was_search.checkpoints.described_model import described_model, require_causal
from was_search.checkpoints.file_hashes import file_hashes
from was_search.checkpoints.gguf_header import MAGIC, GgufHeader, read_header, truncated
from was_search.checkpoints.gguf_rope import rope_factors, scaled_rope
from was_search.checkpoints.limits import check_config
from was_search.checkpoints.quiet_loading import quiet_loading
from was_search.errors import ModelError, ResourceError, reason
from was_search.process.file_lock import LockedFile
from was_search.process.plain_json import dumps

SUFFIX = ".gguf"
_SEAL = "was-search.json"
"""In a kept folder: the sha256 of each of its other files, by name."""
_BYTES = 2
"""Of a weight in bfloat16."""


def is_gguf(path: Path) -> bool:
    """Whether the file at ``path`` is to be read as GGUF: it begins as one, or is called so."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix.lower() == SUFFIX
    except OSError as error:
        raise ModelError(f"model: {path} cannot be read ({error.strerror})") from error


def gguf_folder(path: Path, *, anew: bool = False) -> Path:
    """The checkpoint's folder of the GGUF file at ``path``, written if it is not there; several processes may ask.

    Args:
        path: the file.
        anew: write it even so, in place of a damaged one.

    Raises:
        ModelError: no GGUF file, a damaged one, or one of which transformers reads no causal language model whole.
        ResourceError: ``gguf`` is not installed, or the cache has no room for the folder.
    """
    if path.stat().st_size == 0:
        raise ModelError(f"model: {path} is empty")
    home = _home()
    (digest,) = file_hashes([path], home)
    folder = home / "gguf" / digest
    if not anew and _is_whole(folder, home):
        return folder
    header = read_header(path)
    with _alone(folder):
        if anew or not _is_whole(folder, home):  # another process may have written it meanwhile
            rmtree(folder, ignore_errors=True)
            _require_room(folder.parent, _BYTES * header.elements)
            write_out(path, folder)
            _seal(folder, home)
    return folder


def _seal(folder: Path, home: Path) -> None:
    """Note what the folder's files are, last of all."""
    files = sorted(path for path in folder.iterdir() if path.name != _SEAL)
    hashes = dict(zip((path.name for path in files), file_hashes(files, home), strict=True))
    with appearing(folder / _SEAL) as temporary:
        temporary.write_text(dumps(hashes))


def _is_whole(folder: Path, home: Path) -> bool:
    """Whether the folder's files are those that were written; else other weights would not be noticed."""
    try:
        hashes = json.loads((folder / _SEAL).read_bytes())
        return bool(hashes) and file_hashes([folder / name for name in hashes], home) == list(hashes.values())
    except (OSError, ValueError, AttributeError, TypeError, ModelError):
        return False


def _home() -> Path:
    from platformdirs import user_cache_path

    with suppress(RuntimeError):  # nobody's home, as in containers
        found = user_cache_path("was-search")
        if found.is_absolute():  # an older platformdirs leaves "~" in it
            return found
    raise ResourceError(
        f"model: user id {os.geteuid()} has no home folder and HOME is not set: set XDG_CACHE_HOME to a folder, in "
        "which GGUF files are kept as checkpoints"
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, beside it; what killed processes left of it is gone then."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = LockedFile.take(folder.with_name(f".{folder.name}.lock"), wait=True)
    except OSError as error:
        raise ResourceError(
            f"model: {folder.parent}, where GGUF files are kept as checkpoints, cannot be written to "
            f"({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    assert lock is not None
    try:
        remove_unfinished(folder)
        yield
    finally:
        lock.release()


def _require_room(folder: Path, n_bytes: int) -> None:
    free = disk_usage(folder).free
    if free < n_bytes:
        raise ResourceError(
            f"model: in bfloat16 it takes {n_bytes / 1e9:,.1f} GB, {folder} has {free / 1e9:,.1f} GB of room; set "
            "XDG_CACHE_HOME to a folder with more"
        )


def write_out(path: Path, folder: Path) -> None:
    """Write the GGUF file at ``path`` into ``folder``, missing or empty: configuration, tokenizer, bf16 safetensors.

    The folder appears when it is whole.

    Raises:
        ModelError: as :func:`gguf_folder`.
        ResourceError: ``gguf`` is not installed.
    """
    require_package()
    header = read_header(path)
    _require_whole(header, path)
    rope = scaled_rope(header, path)
    # Alone in a folder: what lies beside the file, such as an adapter, would be read with it.
    with tempfile.TemporaryDirectory() as work, appearing_folder(folder) as unfinished, _quiet():
        (Path(work) / "model.gguf").symlink_to(path.resolve())
        _convert(Path(work), "model.gguf", unfinished, header, rope, path)


def require_package() -> None:
    """Raise a ResourceError where ``gguf`` is not installed, with which transformers reads GGUF files."""
    if find_spec("gguf") is None:
        raise ResourceError("a GGUF file needs gguf, not installed here; pip install 'was-search[gguf]'")


def _require_whole(header: GgufHeader, path: Path) -> None:
    """Refuse a file that ends before its last tensor does, or is one of several parts."""
    from gguf.constants import GGML_QUANT_SIZES

    parts = header.values.get("split.count", 1)
    if parts != 1:
        raise ModelError(f"model: {path} is one of {parts} parts; join them (llama-gguf-split --merge)")
    size = path.stat().st_size
    sizes = {int(kind): size_of for kind, size_of in GGML_QUANT_SIZES.items()}
    for tensor in header.tensors:
        if tensor.kind not in sizes:
            raise ModelError(
                f"model: {path}: weights of type {tensor.kind} ({tensor.name[:80]!r}) are not known; a newer gguf may"
            )
        block, block_bytes = sizes[tensor.kind]
        if header.data_start + tensor.start + tensor.elements // block * block_bytes > size:
            raise truncated(path)


def _convert(work: Path, name: str, folder: Path, header: GgufHeader, rope: dict[str, Any] | None, path: Path) -> None:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    here: dict[str, Any] = {"gguf_file": name, "trust_remote_code": False}
    # Newer releases keep weights packed unless they are told not to.
    packed = getattr(transformers, "GgufConfig", None)
    written_out = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    try:
        config: Any = AutoConfig.from_pretrained(work, **here)
        check_config(path, path, json.loads(config.to_json_string()))
        require_causal(config, path)
        if rope is not None:
            config.rope_parameters = rope
        _require_all(described_model(config, path, len(header.tensors), header.elements), header, path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            work, config=config, dtype=torch.bfloat16, output_loading_info=True, **here, **written_out
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ModelError(f"model: {path} lacks {len(missing)} of the model's weights, such as {missing[0]}")
        tokenizer: Any = AutoTokenizer.from_pretrained(work, **here)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except ModelError:
        raise
    except Exception as error:  # transformers, gguf, tokenizers and safetensors each raise their own
        raise ModelError(f"model: {path} cannot be read as a checkpoint ({reason(error)})") from error


def _require_all(described: Any, header: GgufHeader, path: Path) -> None:
    """Refuse a file with other weights than the model has: transformers leaves out those that it does not know."""
    count, factors = sum(weight.numel() for weight in described.parameters()), rope_factors(header)
    held = header.elements - (0 if factors is None else factors.elements)
    if count != held:
        raise ModelError(
            f"model: {path} holds {held:,} weights, the {described.config.model_type} model that is read of "
            f"it has {count:,}; give the checkpoint that it was made of"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: neither those of loading, nor that over the file's tensors, which no setting switches off."""
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = lambda tensors, **_: tensors
    try:
        with quiet_loading():
            yield
    finally:
        module.tqdm = bar
