"""What becomes of files on their way to us: documents with other values, and bytes that were cut, flipped or added."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from was_search.errors import WasError

NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**63, 10**30, 0.0, 0.5, -1.5, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "text", "auto", "llama", "../x", "/etc/passwd", "model.safetensors", "\0", "\ud800", "é", "x" * 999)

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-(2**70), 2**70),
    st.sampled_from(TEXTS),
    st.text(max_size=8),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: st.DrawFn, document: Any, keys: tuple[str, ...] = ()) -> Any:
    """``document`` with one to three values replaced, removed or added; ``keys`` are names that matter besides."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = _changed_once(draw, found, keys)
    return found


def _changed_once(draw: st.DrawFn, document: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 20)) == 0:
        return draw(VALUES)
    if isinstance(document, dict) and draw(st.integers(0, 4)) == 0:
        document[draw(st.sampled_from(keys) if keys else st.text(max_size=8))] = draw(VALUES)
        return document
    place = draw(st.sampled_from(sorted(document) if isinstance(document, dict) else range(len(document))))
    inner = document[place]
    if isinstance(inner, dict | list) and inner and draw(st.booleans()):
        document[place] = _changed_once(draw, inner, keys)
    elif draw(st.integers(0, 3)) == 0:
        del document[place]
    else:
        document[place] = draw(VALUES)
    return document


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` cut, with bytes flipped, removed or put in, or others altogether."""
    kind = draw(st.integers(0, 4))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    more = draw(st.binary(min_size=1, max_size=9))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + more + content[at:]
    if kind == 2:
        return content[:at] + more + content[at + len(more) :]
    if kind == 3:
        return content[:at] + content[at + draw(st.integers(1, 99)) :]
    return draw(st.binary(max_size=200))


def in_one_line(error: WasError) -> None:
    """What is refused is refused in one line that a terminal can hold."""
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


def as_bytes(document: Any) -> bytes:
    """JSON as Python writes it: numbers that are not finite, and half surrogates as escapes, among it."""
    return json.dumps(document).encode()
