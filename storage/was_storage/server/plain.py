"""Values as JSON that Postgres and browsers accept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from was_search.errors import StorageError


def plain(value: Any) -> Any:
    """``value`` in JSON's types: numpy becomes Python, tuples lists, keys strings, NaN and infinities None.

    Equal to what reading it back from the database gives.

    Raises:
        StorageError: a type without a JSON form, or text holding NUL characters, which Postgres refuses.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        if "\0" in value:
            raise StorageError(f"text with a NUL character cannot be stored: {value!r}")
        return str(value)
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    raise StorageError(f"a {type(value).__name__} cannot be stored as JSON")
