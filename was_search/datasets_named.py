"""The field's usual data sets through ``datasets``, from the hub or from a local copy of the hub's files.

WAS_SEARCH_DATASETS names a folder with ``wikitext2/``, ``c4/`` or ``alpaca/``, each with the files of the hub's
repository (parquet, ``*.json.gz``, parquet). Without it the hub is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from was_search.errors import DataError

FOLDER_VARIABLE = "WAS_SEARCH_DATASETS"
C4_DOCUMENTS = 4000
"""Documents read of C4: the first half of the training shard's is for calibration, the second for search."""

_REPOSITORIES = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "alpaca": "tatsu-lab/alpaca"}


def load_named(name: str, split: str) -> str:
    """Text of ``split`` of a named data set.

    wikitext2 (raw): train for calibration, validation for search, test for test, lines joined by blank lines as
    usual. c4: documents of the first training shard, and of the validation shard for test. alpaca has one split:
    of every ten records six are for calibration and two each for search and test.

    Raises:
        DataError: it is neither in the local folder nor to be had from the hub.
    """
    try:
        match name:
            case "wikitext2":
                return "\n\n".join(_wikitext(split))
            case "c4":
                return "\n\n".join(_c4(split))
            case "alpaca":
                return "\n\n".join(_alpaca(split))
    except DataError:
        raise
    except Exception as error:  # datasets, pyarrow, httpx and huggingface_hub each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data: {name} could not be loaded ({reason}); without a network, download the files of the data set "
            f"{_REPOSITORIES[name]} elsewhere and set {FOLDER_VARIABLE} to the folder that holds them as {name}/"
        ) from error
    raise DataError(f"data: unknown data set {name!r}")


def _local(name: str) -> Path | None:
    root = os.environ.get(FOLDER_VARIABLE)
    folder = Path(root).expanduser() / name if root else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"data: {FOLDER_VARIABLE} is set, but {folder} is no folder")
    return folder


def _files(folder: Path, pattern: str) -> list[str]:
    found = sorted(str(p) for p in folder.rglob(pattern))
    if not found:
        raise DataError(f"data: {folder} has no file {pattern}")
    return found


def _wikitext(split: str) -> Iterable[str]:
    from datasets import load_dataset

    part = {"calibration": "train", "search": "validation", "test": "test"}[split]
    folder = _local("wikitext2")
    if folder is None:
        rows = load_dataset(_REPOSITORIES["wikitext2"], "wikitext-2-raw-v1", split=part)
    else:
        rows = load_dataset("parquet", data_files={part: _files(folder, f"{part}-*.parquet")}, split=part)
    return [str(row["text"]) for row in rows]


def _c4(split: str) -> Iterable[str]:
    from datasets import load_dataset

    part = "validation" if split == "test" else "train"
    folder = _local("c4")
    pattern = f"c4-{part}.00000-of-*.json.gz"
    if folder is None:
        shards = 1024 if part == "train" else 8
        files: Any = {part: f"en/c4-{part}.00000-of-{shards:05d}.json.gz"}
        rows = load_dataset(_REPOSITORIES["c4"], data_files=files, split=part, streaming=True)
    else:
        rows = load_dataset("json", data_files={part: _files(folder, pattern)}, split=part, streaming=True)
    documents = [str(row["text"]) for row in islice(rows, C4_DOCUMENTS)]
    half = len(documents) // 2
    return {"calibration": documents[:half], "search": documents[half:], "test": documents}[split]


def _alpaca(split: str) -> Iterable[str]:
    from datasets import load_dataset

    folder = _local("alpaca")
    if folder is None:
        rows = load_dataset(_REPOSITORIES["alpaca"], split="train")
    else:
        rows = load_dataset("parquet", data_files={"train": _files(folder, "train-*.parquet")}, split="train")
    mine = {"calibration": range(6), "search": range(6, 8), "test": range(8, 10)}[split]
    return [_record(row) for i, row in enumerate(rows) if i % 10 in mine]


def _record(row: Any) -> str:
    context = f"\n\nInput:\n{row['input']}" if row.get("input") else ""
    return f"Instruction:\n{row['instruction']}{context}\n\nResponse:\n{row['output']}"
