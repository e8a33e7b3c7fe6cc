"""Paths that begin with a tilde, also where nobody has a home, as in containers."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced; as it is where there is no such user, or no home."""
    return Path(os.path.expanduser(path))


def no_home(path: str | Path) -> str:
    """What to add to a message about a path that does not exist: "" unless its tilde stands for no folder."""
    first = Path(path).parts[:1]
    if not (first and first[0].startswith("~") and expanded(path) == Path(path)):
        return ""
    return f" ({first[0]!r} stands for no folder here: set HOME, or give the whole path)"
