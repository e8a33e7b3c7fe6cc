"""Does something again and again beside other work, whenever something has changed, at a bounded cost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

_logger = logging.getLogger(__name__)


class Refresher:
    """A thread that calls ``refresh`` after :meth:`changed`; a context manager that ends it.

    Between two calls it pauses at least ``least_seconds``, and so long that the calls' processor time stays below the
    ``share`` of one processor and their duration below ten times that; the first call is not counted, as it imports
    what it needs. A call that raises is made again after the pause; only the first of several failures in a row is
    logged, as a warning.

    Args:
        refresh: called in the thread, one call at a time.
        what: its name in the warning.
        least_seconds: least pause between two calls.
        first_seconds: pause before the first call.
        share: greatest share of one processor that calls take.
    """

    def __init__(
        self,
        refresh: Callable[[], object],
        what: str,
        *,
        least_seconds: float = 15.0,
        first_seconds: float = 1.0,
        share: float = 0.01,
    ) -> None:
        self._refresh = refresh
        self._what = what
        self._least = least_seconds
        self._share = share
        self._condition = threading.Condition()
        self._changed = self._closing = self._failing = False
        self._not_before = time.monotonic() + first_seconds
        self._thread = threading.Thread(target=self._run, name=f"refresh {what}", daemon=True)

    def __enter__(self) -> Refresher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def changed(self) -> None:
        """Say that there is something to refresh; cheap."""
        if not self._changed:
            with self._condition:
                self._changed = True
                self._condition.notify()

    def close(self, patience_seconds: float = 30.0) -> None:
        """End the thread; a call under way is waited for, ``patience_seconds`` at most. Idempotent."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(patience_seconds)

    def _run(self) -> None:
        share = math.inf
        while self._wait():
            wall, processor = time.monotonic(), time.thread_time()
            self._attempt()
            ended = time.monotonic()
            spent = max(time.thread_time() - processor, (ended - wall) / 10.0)
            self._not_before = ended + max(self._least, spent / share)
            share = self._share

    def _wait(self) -> bool:
        """Wait until something has changed and the pause is over; returns False at the end."""
        with self._condition:
            while not self._closing:
                left = self._not_before - time.monotonic()
                if self._changed and left <= 0:
                    self._changed = False
                    return True
                self._condition.wait(left if self._changed else None)
            return False

    def _attempt(self) -> None:
        try:
            self._refresh()
        except Exception as error:
            if not self._failing:
                _logger.warning("%s cannot be brought up to date: %s", self._what, error)
            self._changed = self._failing = True
        else:
            self._failing = False
