"""What signals do to a process of ours; no other module sets a handler.

By default SIGTERM and SIGHUP end a process on the spot; a Postgres or a Ray that it started would run on without it.

- :func:`terminable`, around a command: both raise an exception, as ctrl-C does, so that all it holds is closed.
- :func:`draining`, around a search: the first ctrl-C or SIGTERM asks it to hand nothing out any more.
- :func:`undisturbed`, around the start and end of Postgres: what comes waits until the block has ended.
- :func:`handler_kept`, around the start of Ray, which sets a handler of its own.

Python runs handlers in the main thread only; in other threads all four change nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process from outside; ctrl-C, SIGINT, is Python's own KeyboardInterrupt."""

_ONE_ENDING_SECONDS = 5.0
"""Time in which further signals count as the same ending: shell and kernel both send SIGHUP when a terminal closes."""


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

    Whatever the block raises after that comes from the ending, and is raised as Terminated: Ray's SystemExit, or an
    error of writing to a terminal that has gone.
    """
    if not _handled_here():
        yield
        return
    ended: list[tuple[int, float]] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if ended and now - ended[-1][1] < _ONE_ENDING_SECONDS:
            return
        ended.append((signum, now))
        raise Terminated(signum)

    before = {sig: signal.getsignal(sig) for sig in ENDINGS}
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


@contextmanager
def draining() -> Iterator[threading.Event]:
    """An event that the first ctrl-C or SIGTERM inside the block sets; a second one interrupts at once."""
    drain = threading.Event()
    if not _handled_here():
        yield drain
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if drain.is_set():
            raise KeyboardInterrupt
        drain.set()

    before = {sig: signal.signal(sig, handle) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield drain
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back signals that would end the process until the block has ended, then let them act, each once.

    Processes that are started inside the block get their signals as usual.
    """
    if not _handled_here():
        yield
        return
    held: dict[int, None] = {}  # in the order of their coming

    def hold(signum: int, frame: FrameType | None) -> None:
        held[signum] = None

    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, *ENDINGS)}
    acting = [sig for sig, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for sig in acting:
        signal.signal(sig, hold)
    try:
        yield
    finally:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, acting)  # a signal that acts now would leave the others held
        for sig in acting:
            signal.signal(sig, before[sig])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum in held:
            signal.raise_signal(signum)


@contextmanager
def handler_kept(signum: signal.Signals) -> Iterator[None]:
    """Put the handler of ``signum`` back after a block that may set another one, unless the block has raised."""
    before = signal.getsignal(signum)
    yield
    if callable(before) and _handled_here():
        signal.signal(signum, before)


def _handled_here() -> bool:
    return threading.current_thread() is threading.main_thread()
