"""SIGTERM and SIGHUP end a command as ctrl-C does: by an exception, so that everything it holds is closed.

By default both end a process on the spot. A Postgres or a Ray that it started would run on without it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_ONE_ENDING_SECONDS = 5.0
"""A shell and the kernel both send SIGHUP when a terminal closes: what follows so soon must not cut the cleanup off."""


class Terminated(SystemExit):
    """A signal has ended the process; the exit status is the one that shells give, 128 and the signal's number.

    No KeyboardInterrupt, which some loops take for their user's wish to stop looking, and no Exception. A signal that
    comes while Ray waits is raised by Ray as a new SystemExit; other exceptions it would swallow.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum)

    def __str__(self) -> str:
        return f"ended by {self.signal.name}"


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise :class:`Terminated`; one that is ignored (nohup) stays ignored.

    Whatever the block raises after that is that ending's doing, and comes out as Terminated: Ray's SystemExit, or that
    a terminal which has gone takes no output. Outside the main thread, where Python handles no signals, nothing is
    changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended: list[tuple[int, float]] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if ended and now - ended[-1][1] < _ONE_ENDING_SECONDS:
            return
        ended.append((signum, now))
        raise Terminated(signum)

    before = {sig: signal.getsignal(sig) for sig in SIGNALS}
    heard = [sig for sig, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for sig in heard:
        signal.signal(sig, handle)
    try:
        yield
    except Terminated:
        raise
    except BaseException as error:
        if ended:
            raise Terminated(ended[0][0]) from error
        raise
    finally:
        for sig in heard:
            signal.signal(sig, before[sig])
