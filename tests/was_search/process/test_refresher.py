from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest

from was_search.process.refresher import Refresher


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_nothing_is_done_until_something_changes() -> None:
    calls: list[float] = []
    with Refresher(lambda: calls.append(0.0), "it", least_seconds=0.01, first_seconds=0.0) as refresher:
        time.sleep(0.2)
        assert not calls
        refresher.changed()
        until(lambda: len(calls) == 1)
        time.sleep(0.2)
        assert len(calls) == 1
        refresher.changed()
        until(lambda: len(calls) == 2)


def test_many_changes_are_one_call_and_pauses_are_kept() -> None:
    calls: list[float] = []
    with Refresher(lambda: calls.append(time.monotonic()), "it", least_seconds=0.3, first_seconds=0.0) as refresher:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            refresher.changed()
            time.sleep(0.005)
    assert 2 <= len(calls) <= 6
    assert min(b - a for a, b in pairwise(calls)) >= 0.3


def test_what_costs_much_is_done_rarely() -> None:
    calls: list[float] = []

    def busy() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        calls.append(time.monotonic())

    with Refresher(busy, "it", least_seconds=0.0, first_seconds=0.0, share=0.1) as refresher:
        until(lambda: refresher.changed() or len(calls) == 4)
    assert calls[1] - calls[0] < 0.5, "the first one imports"
    assert min(b - a for a, b in pairwise(calls[1:])) >= 0.5


def test_a_failure_is_said_once_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(len(calls))
        if len(calls) in (1, 2, 4):
            raise ValueError("no such page")

    with Refresher(fail, "the page", least_seconds=0.0, first_seconds=0.0, share=1e9) as refresher:
        refresher.changed()
        until(lambda: len(calls) >= 3)  # what failed is tried again without being asked for
        refresher.changed()
        until(lambda: len(calls) >= 5)
    assert caplog.text.count("the page cannot be brought up to date: no such page") == 2, "once in a row of failures"


def test_closing_waits_for_a_call_and_makes_no_further_one() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        may_end.wait(20.0)
        ended.append(True)

    refresher = Refresher(slow, "it", least_seconds=0.0, first_seconds=0.0)
    with refresher:
        refresher.changed()
        assert begun.wait(20.0)
        refresher.changed()
        refresher.close(patience_seconds=0.01)
        assert not ended, "its patience has an end"
        may_end.set()
    assert ended == [True]
    refresher.close()
