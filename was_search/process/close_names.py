"""What somebody who mistyped a name may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_MOST_ENTRIES = 2000
"""Most entries of a folder that are looked at."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """``; did you mean 'wikitext2'?``, ready to end a message; "" if nothing that is known is close.

    Upper and lower case count as equal, and so do - and _.
    """
    by_plain = {_plain(name): name for name in known}
    close = get_close_matches(_plain(got), by_plain, n=1, cutoff=0.7)
    return f"; did you mean {by_plain[close[0]]!r}?" if close else ""


def did_you_mean_path(path: Path) -> str:
    """:func:`did_you_mean` for a path that does not exist, by the entries of the last folder of it that does.

    Nothing for a folder that is there.
    """
    there = path.absolute()
    rest: list[str] = []
    while not there.is_dir():
        if there == there.parent:
            return ""
        rest.insert(0, there.name)
        there = there.parent
    if not rest:
        return ""
    try:
        names = [entry.name for entry, _ in zip(there.iterdir(), range(_MOST_ENTRIES), strict=False)]
    except OSError:
        return ""
    by_plain = {_plain(name): name for name in names}
    for close in get_close_matches(_plain(rest[0]), by_plain, n=3, cutoff=0.7):
        found = there.joinpath(by_plain[close], *rest[1:])
        if found.exists():
            short = not path.is_absolute() and found.is_relative_to(Path.cwd())
            return f"; did you mean {str(found.relative_to(Path.cwd()) if short else found)!r}?"
    return ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
