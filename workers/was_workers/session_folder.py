"""Where a local Ray keeps its sockets and logs: where Ray would, or in a short folder where that has no room."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from was_search.errors import ResourceError
from was_search.process.short_folders import SOCKET_BYTES, folder_with_room, has_room, is_private

_RAYS_PART = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""What Ray puts after its folder, at its longest."""


def rays_choice() -> str:
    """The folder that Ray would take."""
    system = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    return (os.environ.get("RAY_TMPDIR") or system or "/tmp").rstrip("/") + "/ray"


def session_folder() -> Path | None:
    """A folder of our own for a local Ray, made if it is not there; None where Ray's choice has room for its sockets.

    Raises:
        ResourceError: no temporary folder has a path that is short enough, or ours is somebody else's.
    """
    if has_room(rays_choice(), len(_RAYS_PART)):
        return None
    name = f"was-search-{os.geteuid()}"
    parent = folder_with_room(len(f"/{name}/ray{_RAYS_PART}"))
    if parent is None:
        raise ResourceError(
            f"ray: {rays_choice()} is too long a path for a socket ({SOCKET_BYTES} bytes), and none of the other "
            "temporary folders can be written; set RAY_TMPDIR to a short one"
        )
    folder = parent / name
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder, (os.geteuid(),)):
        raise ResourceError(f"ray: {folder} belongs to someone else; remove it, or set RAY_TMPDIR to a short folder")
    return folder / "ray"  # Ray lets everybody write into its own
