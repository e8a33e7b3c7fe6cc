"""A folder of arrays that take long to make, kept under a hash of what decides them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.texts.protocol import content_hash

Arrays = dict[str, npt.NDArray[Any]]


class ArrayCache:
    """``.npz`` files in ``folder``, shared by processes; without a folder nothing is kept."""

    def __init__(self, folder: str = "") -> None:
        self._folder = Path(folder) if folder else None

    def get(self, parts: tuple[Any, ...], make: Callable[[], Arrays]) -> Arrays:
        """The arrays of ``parts`` (plain values that decide them), made if they are not there."""
        if self._folder is None:
            return make()
        path = self._folder / f"{content_hash(*parts)[:32]}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        found = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}.tmp")
        with own.open("wb") as file:
            np.savez(file, **found)
        own.replace(path)
        return found
