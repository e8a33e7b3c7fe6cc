"""How long a text a model was made for, by its configuration: its positions, scaled or not."""

from __future__ import annotations

import math
from typing import Any

_TEXT_KEYS = ("text_config", "decoder", "generator")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
_SCALED = ("linear", "dynamic", "yarn", "longrope", "su", "llama3")
_MOST = 1 << 40


def most_positions(config: dict[str, Any]) -> int | None:
    """Positions that a model has room for, None where its ``config.json`` names no limit.

    Where rotary angles are scaled, published models leave ``max_position_embeddings`` at the length before scaling
    (linear, dynamic and yarn; users add the entry by hand) or set it to that after (longrope, llama3): the greater of
    both counts. Layers of several kinds have room for what the least of them has.
    """
    text: dict[str, Any] = next((config[key] for key in _TEXT_KEYS if isinstance(config.get(key), dict)), {})
    values = {**config, **text}
    most = _count(values.get("max_position_embeddings"))
    if most is None:
        return None
    return min((_scaled(rope, values, most) for rope in _ropes(values)), default=most)


def _ropes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of rotary angles, of all layers or of each kind of layer, in the new spelling or the old."""
    rope: dict[str, Any] = next((values[key] for key in _ROPE_KEYS if isinstance(values.get(key), dict)), {})
    nested = [each for key, each in rope.items() if key.endswith("_attention") and isinstance(each, dict)]
    return nested or [rope]


def _scaled(rope: dict[str, Any], values: dict[str, Any], most: int) -> int:
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind not in _SCALED or isinstance(factor, bool) or not isinstance(factor, int | float):
        return most
    own = _count(values.get("original_max_position_embeddings"))
    base = _count(rope.get("original_max_position_embeddings")) or own or most
    if not 1 <= factor < math.inf or (most > base and kind != "yarn"):  # scaled already
        return most
    return max(most, int(min(base * factor, _MOST)))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
