from __future__ import annotations

import pytest

from was_search.service.context import Context
from was_search.service.settings import Settings


def test_what_is_opened_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pick(wanted: str) -> str:
        asked.append(wanted)
        return "cpu"

    monkeypatch.setattr("was_search.checkpoints.load.pick_device", pick)
    context = Context(Settings(dtype="float32"))
    assert context.placement_here is context.placement_here
    assert asked == ["auto"]


def test_what_was_opened_is_closed_at_the_end() -> None:
    closed = []
    with Context(Settings()) as context:
        context._stack.callback(lambda: closed.append(True))
        assert not closed
    assert closed == [True]
