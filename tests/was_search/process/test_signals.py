"""Signals that end a command as exceptions, drain a search, or are held back until a block has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from was_search.process import signals
from was_search.process.signals import ENDINGS, Terminated, draining, handler_kept, terminable, undisturbed

pytestmark = pytest.mark.usefixtures("hang_ups_count")
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _ended_by_a_hang_up(clean_up: Callable[[], object]) -> None:
    try:
        signal.raise_signal(signal.SIGHUP)
    finally:
        clean_up()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_block_with_a_shells_status(signum: signal.Signals, status: int) -> None:
    before = [signal.getsignal(sig) for sig in ENDINGS]
    with pytest.raises(Terminated, match=f"^ended by {signum.name}$") as end, terminable():
        signal.raise_signal(signum)
    assert end.value.code == status
    assert [signal.getsignal(sig) for sig in ENDINGS] == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_one_does_not_cut_the_cleanup_off() -> None:
    cleaned: list[str] = []

    def clean_up() -> None:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        cleaned.append("all")

    with pytest.raises(Terminated, match="SIGHUP"), terminable():
        _ended_by_a_hang_up(clean_up)
    assert cleaned == ["all"]


def test_a_later_one_ends_a_cleanup_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ONE_ENDING_SECONDS", 0.0)
    with pytest.raises(Terminated, match="SIGTERM"), terminable():
        _ended_by_a_hang_up(lambda: signal.raise_signal(signal.SIGTERM))


def test_an_error_of_the_cleanup_is_the_endings() -> None:
    """As where the terminal has gone and nothing can be written to it."""

    def clean_up() -> None:
        raise OSError("Input/output error")

    with pytest.raises(Terminated, match="SIGHUP") as end, terminable():
        _ended_by_a_hang_up(clean_up)
    assert isinstance(end.value.__cause__, OSError)


def test_an_exit_that_a_library_makes_of_it_has_our_status() -> None:
    """Ray's C code raises a SystemExit of its own where a signal ends its wait."""

    def clean_up() -> None:
        raise SystemExit(1)

    with pytest.raises(Terminated) as end, terminable():
        _ended_by_a_hang_up(clean_up)
    assert end.value.code == 129


def test_other_errors_are_let_through() -> None:
    with pytest.raises(OSError, match="its own"), terminable():
        raise OSError("its own")


def test_other_threads_are_left_alone() -> None:
    handlers: list[object] = []

    def look() -> None:
        with terminable():
            handlers.extend(signal.getsignal(sig) for sig in ENDINGS)

    before: list[object] = [signal.getsignal(sig) for sig in ENDINGS]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_one_drains_and_the_second_interrupts(signum: signal.Signals) -> None:
    before = [signal.getsignal(sig) for sig in ALL]
    with draining() as drain:
        assert not drain.is_set()
        signal.raise_signal(signum)
        assert drain.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(sig) for sig in ALL] == before


def test_a_search_in_another_thread_drains_by_no_signal() -> None:
    handlers: list[object] = []

    def look() -> None:
        with draining() as drain:
            handlers.extend([*(signal.getsignal(sig) for sig in ALL), drain.is_set()])

    before: list[object] = [signal.getsignal(sig) for sig in ALL]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [*before, False]


def test_a_handler_that_a_library_replaces_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with terminable():
        ours = signal.getsignal(signal.SIGTERM)
        with handler_kept(signal.SIGTERM):
            signal.signal(signal.SIGTERM, lambda signum, frame: None)
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def acted() -> Iterator[list[int]]:
    """Numbers of the signals that have acted so far."""
    numbers: list[int] = []
    before = {sig: signal.signal(sig, lambda signum, frame: numbers.append(signum)) for sig in ALL}
    yield numbers
    for sig, handler in before.items():
        signal.signal(sig, handler)


def test_held_signals_act_once_each_at_the_blocks_end(acted: list[int]) -> None:
    with undisturbed():
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(sig)
        assert acted == []
    assert acted == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    signal.raise_signal(signal.SIGTERM)
    assert acted[3:] == [signal.SIGTERM]


def test_held_in_a_block_within_a_block_they_wait_for_the_outer_one(acted: list[int]) -> None:
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


def test_a_held_interrupt_comes_after_a_block_that_raises(interruptible: None) -> None:

    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise OSError("the block's own")

    with pytest.raises(KeyboardInterrupt) as interrupt, undisturbed():
        fail()
    assert isinstance(interrupt.value.__context__, OSError)


def test_what_is_ignored_is_not_held(acted: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with undisturbed():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
    assert acted == []


def test_nothing_is_held_in_other_threads(acted: list[int]) -> None:
    def block() -> None:
        with undisturbed():
            handlers.extend(signal.getsignal(sig) for sig in ALL)

    handlers: list[object] = []
    before: list[object] = [signal.getsignal(sig) for sig in ALL]
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert handlers == before
