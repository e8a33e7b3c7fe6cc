"""Calls of storage that outlast a database restart."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from was_search.errors import TransientError

T = TypeVar("T")
_logger = logging.getLogger(__name__)


def durable(store: T, *, patience_seconds: float = 120.0) -> T:
    """``store`` with every call repeated while it raises TransientError, for ``patience_seconds`` at most.

    Every method must allow being repeated: then it finishes what was begun.
    """
    return cast(T, _Durable(store, patience_seconds))


class _Durable:
    def __init__(self, store: Any, patience_seconds: float) -> None:
        self._store = store
        self._patience = patience_seconds

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)

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
