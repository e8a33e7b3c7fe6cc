"""How many workers a search may have: a number, or a minimum and a maximum."""

from __future__ import annotations

import re
from dataclasses import dataclass

from was_search.errors import ConfigError

MOST_WORKERS = 1_000_000_000


@dataclass(frozen=True)
class WorkerRange:
    """From ``least`` to ``most`` workers; equal for a fixed number.

    Raises:
        ConfigError: fewer than one, a maximum below the minimum, or an absurdly large number.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ConfigError(f"workers: must be at least 1, got {self.least}")
        if self.most < self.least:
            raise ConfigError(f"workers: the maximum must not be below the minimum, got {self.least}:{self.most}")
        if self.most > MOST_WORKERS:
            raise ConfigError(f"workers: must be at most {MOST_WORKERS}, got {self.most}")

    @classmethod
    def parse(cls, value: object) -> WorkerRange:
        """The range that ``4``, ``"4"`` or ``"2:64"`` says.

        Raises:
            ConfigError: anything else.
        """
        text = str(value).strip()
        found = re.fullmatch(r"(-?\d+)(?::(-?\d+))?", text)
        if isinstance(value, bool) or found is None:
            raise ConfigError(f"workers: must be a whole number, or MINIMUM:MAXIMUM such as 2:64, got {value!r}")
        least = int(found[1])
        return cls(least, least if found[2] is None else int(found[2]))

    @property
    def fixed(self) -> bool:
        return self.least == self.most

    @property
    def plain(self) -> int | str:
        """The range as options and JSON hold it: a number, or text such as ``2:64``."""
        return self.least if self.fixed else str(self)

    def clamp(self, wanted: int) -> int:
        """The number within the range that is nearest to ``wanted``."""
        return min(self.most, max(self.least, wanted))

    def __str__(self) -> str:
        return str(self.least) if self.fixed else f"{self.least}:{self.most}"
