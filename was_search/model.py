"""Find and load a model: a local folder or a hub id. Remote code and pickled weights are never loaded."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from was_search.errors import ModelError, ResourceError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        display_name: without folders.
        folder: the checkpoint's files, for a hub id its snapshot in the local cache.
        revision: the hub's commit; "" for a folder.
    """

    name: str
    display_name: str
    folder: Path
    revision: str

    @property
    def location(self) -> str:
        """What to resolve on another machine: the folder of a local checkpoint, else the hub id."""
        return self.name if self.revision else str(self.folder)

    def tokenizer_hash(self) -> str:
        """sha256 over the tokenizer's files."""
        digest = hashlib.sha256()
        for name in _TOKENIZER_FILES:
            path = self.folder / name
            if path.is_file():
                digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted(self.folder.glob("*.safetensors"))


def resolve_model(name: str, revision: str = "") -> ModelSource:
    """The source called ``name``; a hub id is fetched into the local cache if it is not there.

    Raises:
        ModelError: no such folder or hub id, the hub cannot be reached, or files are missing.
    """
    path = Path(name).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError(f"model: {path} is a file; give the checkpoint's folder")
        return _checked(ModelSource(name, path.resolve().name, path.resolve(), ""))
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"model: {name!r} does not exist, and is no hub id either")
    snapshot = _snapshot(name, revision)  # its folder is called after the commit
    return _checked(ModelSource(name, name.rsplit("/", 1)[-1], snapshot, snapshot.name))


def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "merges.txt"],
            )
        )
    except GatedRepoError as error:
        raise ModelError(f"model: {name} needs its licence accepted on the hub and a token (hf auth login)") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model: {name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model: no folder and no hub model is called {name!r}") from error
    except Exception as error:  # connection errors of several libraries
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model: {name!r} is no local folder, is not in the local hub cache, and the hub cannot be reached "
            f"({reason}); download it elsewhere and give its folder"
        ) from error


def _checked(source: ModelSource) -> ModelSource:
    if not (source.folder / "config.json").is_file():
        raise ModelError(f"model: {source.folder} has no config.json; give the folder of a transformers checkpoint")
    if not source.weight_files():
        pickled = [p.name for p in source.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {pickled[0]} is pickled and is not loaded, convert it to safetensors" if pickled else ""
        raise ModelError(f"model: {source.folder} has no *.safetensors weights{hint}")
    return source


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"model: the tokenizer of {source.display_name} cannot be read ({_reason(error)})") from error


def load_model(source: ModelSource, *, dtype: str, device: str) -> nn.Module:
    """A causal language model in evaluation mode with frozen weights.

    Raises:
        ModelError: unreadable or truncated files, or an architecture that transformers does not know as a causal LM.
        ResourceError: no GPU for ``cuda``.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ResourceError("device: cuda was asked for and no GPU was found; use --device cpu")
    logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            low_cpu_mem_usage=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"model: {source.folder} cannot be loaded as a causal language model ({_reason(error)})") from error
    model.to(device)
    return model.eval().requires_grad_(False)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
