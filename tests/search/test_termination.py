"""Signals that end a command, as exceptions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from was_search import termination
from was_search.termination import SIGNALS, Terminated, terminable

pytestmark = pytest.mark.usefixtures("hang_ups_count")


def _ended_by_a_hang_up(clean_up: Callable[[], object]) -> None:
    try:
        signal.raise_signal(signal.SIGHUP)
    finally:
        clean_up()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_block_with_a_shells_status(signum: signal.Signals, status: int) -> None:
    before = [signal.getsignal(sig) for sig in SIGNALS]
    with pytest.raises(Terminated, match=f"^ended by {signum.name}$") as end, terminable():
        signal.raise_signal(signum)
    assert end.value.code == status
    assert [signal.getsignal(sig) for sig in SIGNALS] == before


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
    monkeypatch.setattr(termination, "_ONE_ENDING_SECONDS", 0.0)
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
            handlers.extend(signal.getsignal(sig) for sig in SIGNALS)

    before: list[object] = [signal.getsignal(sig) for sig in SIGNALS]
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == before
