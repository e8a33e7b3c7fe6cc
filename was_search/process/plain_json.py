"""Figures that are not finite, and JSON: the one way in which they are written and read again.

JSON has no number for NaN and the infinities; Python's writer makes words of them that Postgres, browsers and every
strict reader refuse. Here they are written as null. A loss of more than 700 nats is finite, its perplexity is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """``value`` with None for every float in it that is not finite; mappings become dicts, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """``value`` as JSON that every reader takes; ``options`` as ``json.dumps`` has them."""
    return json.dumps(finite(value), allow_nan=False, **options)


def number(value: float | None) -> float:
    """A figure as it was read from JSON: NaN for null."""
    return math.nan if value is None else float(value)
