"""Result files: one JSON object a line, appended by one process.

What many rows have in common (protocols, setup, versions) may stand in a second file, once for each of its values:
``rows.jsonl`` has ``rows.conditions.jsonl`` beside it, and a row names its conditions by their hash.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file, with their conditions; an unfinished last line is passed over.

    Raises:
        ValueError: a row names conditions that are not there.
    """
    known = {line.pop("hash"): line for line in _lines(conditions_path(path))}
    rows = []
    for row in _lines(path):
        name = row.pop("conditions", None)
        if name is not None and name not in known:
            raise ValueError(f"{conditions_path(path).name}: a row of {path.name} wants conditions {name}")
        rows.append(row | known.get(name, {}))
    return rows


def append_row(path: Path, row: dict[str, Any], shared: dict[str, Any] | None = None) -> None:
    """Append ``row``; ``shared`` are the conditions that it has in common with others."""
    if shared is not None:
        name = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]
        if all(line["hash"] != name for line in _lines(conditions_path(path))):
            _append(conditions_path(path), {"hash": name, **shared})
        row = {**row, "conditions": name}
    _append(path, row)


def conditions_path(path: Path) -> Path:
    """The file of the conditions that rows in ``path`` share."""
    return path.with_suffix(f".conditions{path.suffix}")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _append(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(value) + "\n")
