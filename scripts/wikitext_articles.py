"""Divide a raw WikiText file by its articles into the three texts of a search.

`python scripts/wikitext_articles.py wiki.test.raw FOLDER` writes `calibration.txt`, `search.txt` and `test.txt`, which
`--data FOLDER` takes. Articles stay whole and in their order: those that begin in the first 30 % of the characters are
for calibration, those that begin before 50 % for the search, the rest for the test. Lines end in one line feed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

TITLE = re.compile(r"^ = (?!=)[^\n]*(?<!=) = $", re.MULTILINE)
"""The line that begins an article: one ``=`` on either side, where headings inside it have more."""

BEGINS = {"calibration": 0.0, "search": 0.3, "test": 0.5}
"""Share of the characters from which on an article that begins there belongs to the split."""


class ArticlesError(Exception):
    """What a user can mend, in one line."""


def divide(text: str) -> dict[str, str]:
    """The texts of the splits; joined in order they are ``text`` from its first article on.

    Raises:
        ArticlesError: a split would have no article.
    """
    titles = [found.start() for found in TITLE.finditer(text)]
    starts = [next((at for at in titles if at >= share * len(text)), len(text)) for share in BEGINS.values()]
    parts = {split: text[start:end] for split, start, end in zip(BEGINS, starts, [*starts[1:], len(text)], strict=True)}
    for split, part in parts.items():
        if not part:
            raise ArticlesError(f"{len(titles)} article(s) found, lines ' = Title = ': none begins in {split}'s share")
    return parts


def write(source: Path, folder: Path) -> dict[str, int]:
    """Write the three texts of ``source`` into ``folder``; returns the number of articles in each.

    Raises:
        ArticlesError: ``source`` cannot be read, or a split would have no article.
    """
    try:
        text = source.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArticlesError(f"{source}: cannot be read as UTF-8 text ({error})") from error
    parts = divide(text)
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in parts.items():
        (folder / f"{split}.txt").write_bytes(part.encode())
    return {split: len(TITLE.findall(part)) for split, part in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="such as wiki.test.raw of wikitext-2-raw-v1")
    parser.add_argument("folder", type=Path, help="made if it is not there")
    options = parser.parse_args(arguments)
    try:
        found = write(options.source, options.folder)
    except ArticlesError as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: " + ", ".join(f"{split} {count} articles" for split, count in found.items()))


if __name__ == "__main__":
    main()
