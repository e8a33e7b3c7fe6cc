"""Whether something can be written to a place, asked before it has been computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def unwritable(folder: Path) -> str:
    """Why nothing can be written into ``folder``, which need not exist yet; "" where something can.

    Whatever exists of it is tried, as permissions do not tell all: quotas, exported and special file systems.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written"
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there}: {error.strerror}"
