"""Text of tokens that come one by one, and the strings that end it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from was_search.errors import ConfigError

_REPLACEMENT = "\ufffd"
_MOST_HELD = 8
"""Tokens of an unfinished character that are waited for: none has more than four bytes, and bytes may be tokens."""


class IncrementalText:
    """The text of tokens as they come; all parts together are the tokenizer's text of all tokens.

    A part is what a token adds to the text of the few before it, as blanks and joined characters depend on these. A
    character of which only some bytes are there is held back.

    Args:
        tokenizer: of transformers.
        before: ids that the text goes on from, such as the prompt's; their own text is not given again.
    """

    def __init__(self, tokenizer: Any, before: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)[-_MOST_HELD:]
        self._shown = len(self._ids)
        self._from = 0

    def add(self, token: int) -> str:
        """What is certain of the text after one more token; often nothing."""
        self._ids.append(token)
        added = self._added()
        waits = not added or added.endswith(_REPLACEMENT)
        if waits and len(self._ids) - self._shown < _MOST_HELD:
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return added

    def rest(self) -> str:
        """What was held back."""
        added = self._added()
        self._from, self._shown = self._shown, len(self._ids)
        return added

    def _added(self) -> str:
        known, text = (self._decoded(self._ids[self._from : end]) for end in (self._shown, len(self._ids)))
        return text[_common(known, text) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _common(known: str, text: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(known, text, strict=False)) if a != b), min(len(known), len(text)))


def until_stop(parts: Iterable[str], stops: Iterable[str]) -> Iterator[str]:
    """The text of ``parts`` up to the first of the strings ``stops``, which is left out.

    What may be the beginning of such a string is held back until it is known. Ends without reading more parts.

    Raises:
        ConfigError: one of ``stops`` is empty.
    """
    stops = require_stops(stops)
    held = ""
    for part in parts:
        held += part
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def require_stops(stops: Iterable[str]) -> tuple[str, ...]:
    """The strings that end a text; refuses an empty one, which every text holds.

    Raises:
        ConfigError: one of ``stops`` is empty.
    """
    stops = tuple(stops)
    if "" in stops:
        raise ConfigError("stop: a string that ends the text must not be empty")
    return stops


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that ``stop`` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
