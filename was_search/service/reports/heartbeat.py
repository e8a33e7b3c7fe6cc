"""A line every half minute while a phase lasts, for output that cannot be redrawn: files, pipes, batch logs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

EVERY_SECONDS = 30.0

Ticking = Callable[[Callable[[], None]], AbstractContextManager[None]]
"""Calls a function again and again while its block lasts."""


@contextmanager
def every_half_minute(say: Callable[[], None]) -> Iterator[None]:
    """Call ``say`` every :data:`EVERY_SECONDS` inside the block, in a thread; not once the block has ended."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(EVERY_SECONDS):
            try:
                say()
            except (OSError, ValueError):  # nobody reads any more, or the stream was closed
                return

    thread = threading.Thread(target=run, name="progress lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(EVERY_SECONDS)


def eta_seconds(done: int, total: int | None, seconds: float) -> float | None:
    """Seconds until ``total`` parts are done at the pace so far; None before one is done, or without a total."""
    return None if total is None or done <= 0 else seconds * max(total - done, 0) / done


def progress_words(done: int, total: int | None, seconds: float) -> str:
    """``3 of 8, 1.5 min, ETA 2.5 min``, as far as it is known."""
    parts = [clock(seconds)] if total is None else [f"{done} of {total}", clock(seconds)]
    left = eta_seconds(done, total, seconds)
    return ", ".join([*parts, *([] if left is None else [f"ETA {clock(left)}"])])


def clock(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
