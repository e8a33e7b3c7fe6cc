"""A tiny random checkpoint, written once in a process and copied for whoever wants one."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from transformers import AutoTokenizer

from scripts.make_random_model import make_random_model


@cache
def _written() -> Path:
    """A folder with the checkpoint, and one with its tokenizer as transformers saves it."""
    folder = Path(tempfile.mkdtemp(prefix="was-random-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    AutoTokenizer.from_pretrained(make_random_model(folder / "model", "tiny")).save_pretrained(folder / "tokenizer")
    return folder


def random_checkpoint(folder: Path) -> Path:
    """``folder``, which must not exist, with the checkpoint."""
    shutil.copytree(_written() / "model", folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """The checkpoint's tokenizer beside a model of another kind: a token a byte."""
    shutil.copytree(_written() / "tokenizer", folder, dirs_exist_ok=True)
