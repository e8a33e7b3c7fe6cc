"""What the search loop needs of storage, and writes to it that outlast a database restart."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

from was_search.errors import TransientError
from was_search.hand_out import HandOut, Result
from was_search.slots import Slot

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class SlotBook(Protocol):
    """What the loop needs of storage: ``was_storage``'s coordinator session."""

    def slots(self) -> list[Slot]: ...

    def begin(self, hand_outs: Sequence[HandOut], lease_seconds: float) -> list[int]: ...

    def trial_of(self, number: int) -> int | None: ...

    def shrink(self, n_slots: int) -> int: ...

    def requeue(self, number: int, reason: str) -> object: ...

    def finish_all(self, results: Sequence[Result]) -> list[bool]: ...


def durable(book: T, *, patience_seconds: float = 120.0) -> T:
    """``book`` with every call repeated while it raises TransientError, for ``patience_seconds`` at most.

    Every method of a book, or of a control desk, may be repeated: it finishes what was begun.
    """
    return cast(T, _Durable(book, patience_seconds))


class _Durable:
    def __init__(self, book: Any, patience_seconds: float) -> None:
        self._book = book
        self._patience = patience_seconds

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._book, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            end, pause = time.monotonic() + self._patience, 0.1
            while True:
                try:
                    return method(*args, **kwargs)
                except TransientError as error:
                    if time.monotonic() + pause > end:
                        raise
                    _logger.warning("%s: %s; trying again", name, error)
                    time.sleep(pause)
                    pause = min(2 * pause, 5.0)

        return call
