"""Text for terminals, pipes and batch logs whose encoding lacks some of its characters: stand-ins, never an error."""

from __future__ import annotations

import codecs
import io
import sys

_NAME = "was_search.instead"
_INSTEAD = {
    "✓": "+",
    "±": "+-",
    "×": "x",
    "…": "...",
    "•": "*",
    "→": "->",
    **dict.fromkeys("‐‑‒–—−", "-"),
    **dict.fromkeys("‘’‚“”„", "'"),
    **dict.fromkeys("\u00a0\u2009\u202f", " "),
    **dict.fromkeys("━─╺╸", "-"),
    **dict.fromkeys((chr(code) for code in range(0x2800, 0x2900)), "*"),  # the spinner of a bar
}


def forgiving() -> None:
    """Let standard output and standard error take every text, whatever their encoding.

    Our marks have stand-ins; any other character that the encoding lacks is written as JSON writes it (``\\u00e9``), so
    that a line of JSON stays one. Streams that somebody else has put in place of the process's own are left alone.
    """
    codecs.register_error(_NAME, _instead)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _instead(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_INSTEAD.get(character) or _escaped(character) for character in lost), error.end


def _escaped(character: str) -> str:
    """The escape of JSON: four digits, two of them for a character beyond the first 65,536."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
