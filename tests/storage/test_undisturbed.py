"""Signals that are held back until a block has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from was_storage.undisturbed import undisturbed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def acted() -> Iterator[list[int]]:
    """Numbers of the signals that have acted so far."""
    numbers: list[int] = []
    before = {sig: signal.signal(sig, lambda signum, frame: numbers.append(signum)) for sig in SIGNALS}
    yield numbers
    for sig, handler in before.items():
        signal.signal(sig, handler)


def test_they_act_once_each_at_the_blocks_end(acted: list[int]) -> None:
    with undisturbed():
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(sig)
        assert acted == []
    assert acted == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    signal.raise_signal(signal.SIGTERM)
    assert acted[3:] == [signal.SIGTERM]


def test_in_a_block_within_a_block_they_wait_for_the_outer_one(acted: list[int]) -> None:
    with undisturbed():
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
        assert acted == []
    assert acted == [signal.SIGTERM]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background, whose SIGINT a shell has ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_comes_after_a_block_that_raises(interruptible: None) -> None:

    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise OSError("the block's own")

    with pytest.raises(KeyboardInterrupt) as interrupt, undisturbed():
        fail()
    assert isinstance(interrupt.value.__context__, OSError)


def test_what_is_ignored_stays_ignored(acted: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with undisturbed():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
    assert acted == []


def test_nothing_is_changed_in_other_threads(acted: list[int]) -> None:
    def block() -> None:
        with undisturbed():
            handlers.extend(signal.getsignal(sig) for sig in SIGNALS)

    handlers: list[object] = []
    before: list[object] = [signal.getsignal(sig) for sig in SIGNALS]
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert handlers == before
