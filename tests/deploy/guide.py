"""What a guide tells its reader to type: the blocks of one chapter of a Markdown page, in their order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading above it, its language, and its text."""

    heading: str
    language: str
    text: str


@dataclass(frozen=True)
class Chapter:
    """A chapter's text and blocks."""

    text: str
    blocks: tuple[Block, ...]

    def said(self, pattern: str) -> str:
        """The one text between backticks that fits ``pattern`` as a whole."""
        found = [span for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", self.text)) if re.fullmatch(pattern, span)]
        assert len(found) == 1, f"the guide says {found} for {pattern}"
        return str(found[0])


def chapter(path: Path, title: str) -> Chapter:
    """The chapter ``## title`` of the page at ``path``."""
    page = path.read_text(encoding="utf-8")
    start = page.index(f"\n## {title}\n")
    end = page.find("\n## ", start + 1)
    text = page[start : end if end >= 0 else len(page)]
    blocks = []
    for found in _FENCE.finditer(text):
        headings = re.findall(r"^### (.+)$", text[: found.start()], re.MULTILINE)
        blocks.append(Block(headings[-1] if headings else "", found[1], found[2]))
    return Chapter(text, tuple(blocks))
