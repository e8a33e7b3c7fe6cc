"""Folders with short paths: a Unix socket's path has 107 bytes, and batch systems make long temporary folders."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

SOCKET_BYTES = 107
"""Longest path of a socket: sun_path without its closing NUL."""

_USUAL = ("/tmp", "/var/tmp", "/dev/shm")


def folder_with_room(n_bytes: int) -> Path | None:
    """The temporary folder, or else another usual one, under whose path ``n_bytes`` more fit into a socket's.

    None where there is no such folder that this process may write.
    """
    for folder in dict.fromkeys([tempfile.gettempdir(), *_USUAL]):
        if has_room(folder, n_bytes) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    return None


def has_room(folder: str | Path, n_bytes: int) -> bool:
    """Whether a socket's path may go on for ``n_bytes`` after the folder's."""
    return len(os.fsencode(str(folder).rstrip("/"))) + n_bytes <= SOCKET_BYTES


def is_private(folder: Path, owners: tuple[int, ...]) -> bool:
    """Whether a folder belongs to one of these users, and nobody else may enter it."""
    found = folder.lstat()
    return not folder.is_symlink() and found.st_uid in owners and not found.st_mode & 0o077
