"""Where the embedded server's socket lies, and what its pid file says."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from was_search.errors import StorageError
from was_storage.server import postgres_binaries

HOME_VARIABLE = "WAS_SEARCH_HOME"
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_BYTES = 107
"""Longest path of a socket: sun_path without its closing NUL."""


def choose_socket_folder(folder: Path) -> Path:
    """The data folder itself, or a private temporary one where its path is too long for a socket."""
    if len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_BYTES:
        return folder
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    short = Path(tempfile.gettempdir()) / f"was-search-{os.geteuid()}-{digest}"
    if len(os.fsencode(short / SOCKET_NAME)) > SOCKET_BYTES:
        raise StorageError(
            f"embedded Postgres: {folder} is too long a path for a socket ({SOCKET_BYTES} bytes), and so is "
            f"the temporary folder's: set {HOME_VARIABLE} or TMPDIR to a shorter one"
        )
    account = postgres_binaries.server_account()
    owner = os.geteuid() if account is None else account.pw_uid
    short.mkdir(mode=0o700, exist_ok=True)
    found = short.lstat()
    if short.is_symlink() or found.st_uid not in (owner, os.geteuid()) or found.st_mode & 0o077:
        raise StorageError(f"embedded Postgres: {short} belongs to someone else; remove it or set {HOME_VARIABLE}")
    return short


def remove_stale_pid(folder: Path) -> None:
    """Forget a dead server's process number: where something else has it now, Postgres would not start."""
    path = folder / "postmaster.pid"
    if not path.exists() or not Path("/proc/self").exists():
        return
    lines = path.read_text().splitlines()
    name = Path("/proc") / (lines[0].strip() if lines else "none") / "comm"
    if not name.exists() or name.read_text().strip() != "postgres":
        path.unlink()


def running_socket(folder: Path) -> Path | None:
    """The socket's folder as the running server wrote it down: line 5 of its pid file."""
    try:
        lines = (folder / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    return Path(lines[4]) if len(lines) > 4 and lines[4] else None
