"""A block that may neither hang nor take memory."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def bounded(seconds: int = 120, more_bytes: int = 512 << 20) -> Iterator[None]:
    """Raises MemoryError for ``more_bytes`` of address space, and TimeoutError after ``seconds``."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still not done after {seconds} s")

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (taken + more_bytes, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)
