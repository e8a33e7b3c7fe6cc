"""A study's page in optuna-dashboard: its note, and plots as plotly's JSON, in the attributes of the Optuna study.

optuna-dashboard's own functions take a commit for every 2,045 characters, hundreds for one page, and importing it takes
more than a second. Here a page is three statements of the caller's transaction, and what is unchanged is not written.
The rows are those that its functions write; ``tests/storage/dashboard/test_study_page.py`` reads them with these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, text

from was_search.errors import StudyError

_LONGEST = 2045
"""Characters of one attribute, as optuna-dashboard cuts them."""

_NOTE, _NOTE_VERSION, _PLOT = "dashboard:note_str:", "dashboard:note_ver", "dashboard:plot_data:"
_FIGURE_ID = re.compile(r"[A-Za-z0-9_.-]+")
"""A figure's id. optuna-dashboard permits colons too, but then takes one figure's pieces for another's."""

_STORED = text(
    "SELECT a.key, md5(a.value_json) AS digest FROM study_system_attributes a WHERE a.study_id = :study_id "
    "AND EXISTS (SELECT 1 FROM unnest(CAST(:prefixes AS text[])) AS p(prefix) WHERE starts_with(a.key, p.prefix))"
)
_VERSION = text("SELECT value_json FROM study_system_attributes WHERE study_id = :study_id AND key = :key")
_WRITE = text(
    "INSERT INTO study_system_attributes (study_id, key, value_json) "
    "SELECT :study_id, k, v FROM unnest(CAST(:keys AS text[]), CAST(:values AS text[])) AS r(k, v) "
    "ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json"
)
_REMOVE = text("DELETE FROM study_system_attributes WHERE study_id = :study_id AND key = ANY(:keys)")


def write(connection: Connection, optuna_study_id: int, note: str | None, figures: Mapping[str, str]) -> int:
    """Show ``note`` (Markdown; None leaves it) and ``figures`` (plotly's JSON by id) on the study's page.

    Figures that are not named stay. Returns how many attributes were written or removed.

    Raises:
        StudyError: a figure's id has other characters than letters, digits, ``-``, ``_`` and ``.``.
    """
    texts = _texts(note, figures)
    wanted = {key: json.dumps(words) for key, words in _pieces(texts).items()}
    rows = connection.execute(_STORED, {"study_id": optuna_study_id, "prefixes": list(texts)})
    stored = {row.key: row.digest for row in rows}
    changed = {key: value for key, value in wanted.items() if stored.get(key) != _md5(value)}
    removed = [key for key in stored if key not in wanted]
    if _has_note((*changed, *removed)):
        version = connection.execute(_VERSION, {"study_id": optuna_study_id, "key": _NOTE_VERSION}).scalar()
        changed[_NOTE_VERSION] = json.dumps(_next_version(None if version is None else json.loads(version)))
    if changed:
        values: dict[str, Any] = {"keys": list(changed), "values": list(changed.values())}
        connection.execute(_WRITE, {"study_id": optuna_study_id, **values})
    if removed:
        connection.execute(_REMOVE, {"study_id": optuna_study_id, "keys": removed})
    return len(changed) + len(removed)


def _texts(note: str | None, figures: Mapping[str, str]) -> dict[str, str]:
    """What is to be stored, by the prefix of its attributes' keys."""
    texts = {} if note is None else {_NOTE: note}
    for name, figure in figures.items():
        if not _FIGURE_ID.fullmatch(name):
            raise StudyError(f"figure {name!r}: an id has letters, digits, '-', '_' and '.' only")
        texts[f"{_PLOT}{name}:"] = figure
    return texts


def _pieces(texts: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{prefix}{i}": words[i * _LONGEST : (i + 1) * _LONGEST]
        for prefix, words in texts.items()
        for i in range(-(-len(words) // _LONGEST))
    }


def _has_note(keys: Iterable[str]) -> bool:
    return any(key.startswith(_NOTE) for key in keys)


def _next_version(version: Any) -> int:
    """The note's version after ``value``: the page compares versions before it saves an edit of the note."""
    return 1 + int(version or 0)


def _md5(value: str) -> str:
    return hashlib.md5(value.encode(), usedforsecurity=False).hexdigest()
