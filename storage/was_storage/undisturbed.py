"""Blocks that no signal cuts off."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back signals that would end the process until the block has ended, then let them act, each once.

    Outside the main thread nothing is done: signals act in the main thread only. Processes that are started inside the
    block get their signals as ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: dict[int, None] = {}  # in the order of their coming

    def hold(signum: int, frame: FrameType | None) -> None:
        held[signum] = None

    before = {sig: signal.getsignal(sig) for sig in _SIGNALS}
    acting = [sig for sig, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for sig in acting:
        signal.signal(sig, hold)
    try:
        yield
    finally:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, acting)  # one that acts now would leave the others held
        for sig in acting:
            signal.signal(sig, before[sig])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum in held:
            signal.raise_signal(signum)
