"""One check of what a run needs, and how an error of ours becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from was_search.errors import WasError


@dataclass(frozen=True)
class Check:
    """One check; ``good`` is None for what is optional and absent."""

    name: str
    good: bool | None
    found: str
    advice: str = ""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """What ``check`` finds; an error of ours is a check that failed, with its words as the advice."""
    try:
        return check()
    except WasError as error:
        return Check(name, False, "cannot be used", str(error))
