"""Names of studies: which are allowed, and their form in a path."""

from __future__ import annotations

import hashlib
import unicodedata

from was_search.errors import StudyError

MAX_CHARACTERS = 200
_MAX_FOLDER_BYTES = 200
"""Longest name of a folder; most file systems take 255."""


def check_name(name: str) -> None:
    """Refuse names that could be taken for others or would play tricks where they are shown.

    Raises:
        StudyError: not 1-200 printable characters (so no control, direction or zero-width ones), blanks at its ends,
            or characters that Unicode takes for others (full-width letters, ligatures; NFKC).
    """
    if not name or len(name) > MAX_CHARACTERS:
        raise StudyError(f"study name: must have 1 to {MAX_CHARACTERS} characters, got {len(name)}")
    if not name.isprintable() or name != name.strip():
        raise StudyError(f"study name: must be printable, without blanks at its ends, got {name!r}")
    if (plain := unicodedata.normalize("NFKC", name)) != name:
        raise StudyError(f"study name: {name!r} has characters that stand for others; write {plain!r}")


def folder_name(name: str) -> str:
    """``name`` as one part of a path: no two names share it, and none leads to another folder.

    An ordinary name stays as it is; ``/``, ``%`` and a leading ``.`` are written as in URLs, and what is too
    long for a file system ends in a hash.
    """
    quoted = "".join(f"%{ord(c):02X}" if c in "/%\\" or not c.isprintable() else c for c in name)
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted.encode("utf-8", "surrogatepass")) <= _MAX_FOLDER_BYTES:
        return quoted
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return quoted.encode()[: _MAX_FOLDER_BYTES - 17].decode(errors="ignore") + "-" + digest
