"""The field's usual data sets through ``datasets``, from the hub or from a local copy of the hub's files.

WAS_SEARCH_DATASETS names a folder that holds ``wikitext2/``, ``c4/`` or ``alpaca/``, each with files of the hub's
repository, in any subfolder; where it is set the hub is never asked:

=========  ======================  ==================================================================
name       repository              files needed
=========  ======================  ==================================================================
wikitext2  Salesforce/wikitext     wikitext-2-raw-v1/{train,validation,test}-*.parquet
c4         allenai/c4              en/c4-{train,validation}.00000-of-*.json.gz
alpaca     tatsu-lab/alpaca        data/train-*.parquet (or alpaca_data.json, the same records)
=========  ======================  ==================================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from was_search.errors import DataError, reason
from was_search.process.home import expanded, no_home

FOLDER_VARIABLE = "WAS_SEARCH_DATASETS"
"""Environment variable with the folder of local copies."""

C4_DOCUMENTS = 4000
"""Documents read of a C4 shard; the training shard's first half is for calibration, its second for search."""

REPOSITORIES = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "alpaca": "tatsu-lab/alpaca"}
"""The hub's repository of each named data set."""

_FILES = {
    "wikitext2": "wikitext-2-raw-v1/*.parquet",
    "c4": "en/c4-train.00000-of-01024.json.gz and en/c4-validation.00000-of-00008.json.gz",
    "alpaca": "data/*.parquet",
}
_ALPACA_TENTHS = {"calibration": range(6), "search": range(6, 8), "test": range(8, 10)}
_ALPACA_INTRODUCTION = "Below is an instruction that describes a task"


def load_named(name: str, split: str) -> str:
    """Text of ``split`` of a named data set; remembered for the process's life.

    - wikitext2 (raw): train for calibration, validation for search, test for test; lines joined by blank lines.
    - c4 (en): the first :data:`C4_DOCUMENTS` documents of the first training shard, the first half for calibration
      and the second for search; as many of the first validation shard for test; joined by blank lines.
    - alpaca has one split: of every ten records in order the first six are for calibration and the next two each
      for search and test; each is Alpaca's prompt with its output, joined by blank lines.

    Raises:
        DataError: an unknown name, files missing from the local copy, or the hub cannot be reached.
    """
    if name not in REPOSITORIES:
        raise DataError(f"data: must be one of {', '.join(REPOSITORIES)}, got {name!r}")
    return _load(name, split, os.environ.get(FOLDER_VARIABLE, ""))


@lru_cache(maxsize=3)
def _load(name: str, split: str, root: str) -> str:
    folder = expanded(root) / name if root else None
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"data: {FOLDER_VARIABLE} is set, but {folder} is no folder{no_home(root)}; put {_FILES[name]} of the "
            f"data set {REPOSITORIES[name]} there, or unset it to use the hub"
        )
    try:
        with _quiet():
            texts = {"wikitext2": _wikitext, "c4": _c4, "alpaca": _alpaca}[name](split, folder)
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow, httpx and huggingface_hub each raise their own
        if folder is not None:
            raise DataError(
                f"data: the local copy {folder} cannot be read ({reason(error)}); download {_FILES[name]} of "
                f"{REPOSITORIES[name]} again"
            ) from error
        raise DataError(
            f"data: {name} could not be loaded from the hub ({reason(error)}); without a network, download "
            f"{_FILES[name]} of the data set {REPOSITORIES[name]} elsewhere into FOLDER/{name}/ and set "
            f"{FOLDER_VARIABLE}=FOLDER"
        ) from error
    text = "\n\n".join(texts)
    if not text.strip():
        raise DataError(f"data: the {split} split of {name} is empty{f' in {folder}' if folder else ''}")
    return text


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch the progress bars of ``datasets`` off during the block."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _files(folder: Path, inner: str, *patterns: str) -> list[str]:
    """Files of the first of ``patterns`` that matches, under ``folder/inner`` if that exists, else ``folder``."""
    base = folder / inner if (folder / inner).is_dir() else folder
    for pattern in patterns:
        found = sorted(str(path) for path in base.rglob(pattern))
        if found:
            return found
    raise DataError(f"data: {base} has no file {' or '.join(patterns)}")


def _wikitext(split: str, folder: Path | None) -> list[str]:
    from datasets import load_dataset

    part = {"calibration": "train", "search": "validation", "test": "test"}[split]
    if folder is None:
        rows = load_dataset(REPOSITORIES["wikitext2"], "wikitext-2-raw-v1", split=part)
    else:
        files = _files(folder, "wikitext-2-raw-v1", f"{part}-*.parquet")
        rows = load_dataset("parquet", data_files={part: files}, split=part)
    return [str(text) for text in rows["text"]]


def _c4(split: str, folder: Path | None) -> list[str]:
    from datasets import load_dataset

    part = "validation" if split == "test" else "train"
    if folder is None:
        shards = 8 if part == "validation" else 1024
        files: Any = {part: f"en/c4-{part}.00000-of-{shards:05d}.json.gz"}
        rows = load_dataset(REPOSITORIES["c4"], data_files=files, split=part, streaming=True)
    else:
        files = {part: _files(folder, "en", f"c4-{part}.00000-of-*.json.gz")}
        rows = load_dataset("json", data_files=files, split=part, streaming=True)
    documents = [str(row["text"]) for row in islice(rows, C4_DOCUMENTS)]
    half = len(documents) // 2
    return {"calibration": documents[:half], "search": documents[half:], "test": documents}[split]


def _alpaca(split: str, folder: Path | None) -> list[str]:
    from datasets import load_dataset

    if folder is None:
        rows = load_dataset(REPOSITORIES["alpaca"], split="train")
    else:
        files = _files(folder, "data", "train-*.parquet", "alpaca_data*.json")
        rows = load_dataset(Path(files[0]).suffix[1:], data_files={"train": files}, split="train")
    return [alpaca_record(row) for i, row in enumerate(rows) if i % 10 in _ALPACA_TENTHS[split]]


def alpaca_record(row: dict[str, str]) -> str:
    """One record as Alpaca's models are trained on it: introduction, instruction, input if any, response."""
    if row.get("input"):
        introduction = f"{_ALPACA_INTRODUCTION}, paired with an input that provides further context."
        given = f"### Input:\n{row['input']}\n\n"
    else:
        introduction, given = f"{_ALPACA_INTRODUCTION}.", ""
    return (
        f"{introduction} Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}"
    )
