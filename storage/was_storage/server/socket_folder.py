"""Where the embedded server's socket lies, and what its pid file says."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from was_search.errors import StorageError
from was_search.process.short_folders import SOCKET_BYTES, folder_with_room, has_room, is_private
from was_storage.server import postgres_binaries

HOME_VARIABLE = "WAS_SEARCH_HOME"
SOCKET_NAME = ".s.PGSQL.5432"


def choose_socket_folder(folder: Path) -> Path:
    """The data folder itself, or a private temporary one where its path is too long for a socket."""
    if has_room(folder, len(f"/{SOCKET_NAME}")):
        return folder
    name = f"was-search-{os.geteuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    parent = folder_with_room(len(f"/{name}/{SOCKET_NAME}"))
    if parent is None:
        raise StorageError(
            f"embedded Postgres: {folder} is too long a path for a socket ({SOCKET_BYTES} bytes), and so is every "
            f"temporary folder's that can be written: set {HOME_VARIABLE} or TMPDIR to a shorter one"
        )
    short = parent / name
    account = postgres_binaries.server_account()
    owner = os.geteuid() if account is None else account.pw_uid
    short.mkdir(mode=0o700, exist_ok=True)
    if not is_private(short, (owner, os.geteuid())):
        raise StorageError(f"embedded Postgres: {short} belongs to someone else; remove it or set {HOME_VARIABLE}")
    return short


def remove_stale_locks(folder: Path, socket_folder: Path) -> None:
    """Forget a dead server's process number: where something else has it now, Postgres would not start.

    A number is taken by a dead process that nobody has waited for yet too, and by another Postgres, as in a container
    where numbers are small; a server of this folder works inside it.
    """
    if not Path("/proc/self").exists():
        return
    for path in (folder / "postmaster.pid", socket_folder / f"{SOCKET_NAME}.lock"):
        if path.exists():
            lines = path.read_text().splitlines()
            if not _serves(Path("/proc") / (lines[0].strip() if lines else "none"), folder):
                path.unlink()


def _serves(process: Path, folder: Path) -> bool:
    try:
        return (process / "comm").read_text().strip() == "postgres" and (process / "cwd").samefile(folder)
    except FileNotFoundError:
        return False
    except PermissionError:  # another account's: not known
        return True


def running_socket(folder: Path) -> Path | None:
    """The socket's folder as the running server wrote it down: line 5 of its pid file."""
    try:
        lines = (folder / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    return Path(lines[4]) if len(lines) > 4 and lines[4] else None
