"""What is announced of a run's end, and to whom."""

from __future__ import annotations

import json

import pytest

from was_search.errors import StorageError, StudyError
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.watching.notify import Announcement, announced, payload
from was_search.studies.control import Ending, EndingKind
from was_search.studies.slots import Slot, SlotState


@pytest.fixture
def sent(monkeypatch):
    found = []
    monkeypatch.setattr("was_search.service.watching.notify.post", lambda url, message: found.append((url, message)))
    return found


@pytest.fixture
def context():
    return Context(Settings(notify="https://example.org/x", study="s"))


def test_one_message_for_blocks_in_blocks(context, sent) -> None:
    slots = [Slot(0, SlotState.COMPLETE, loss_nats=2.0, nll_nats=2.0), Slot(1, SlotState.WAITING)]
    with announced(context) as outer:
        with announced(context) as inner:
            inner.slots, inner.ending = slots, Ending(EndingKind.STOPPED, "patience: enough")
        assert inner is outer
        assert sent == []
    ((url, message),) = sent
    assert url == "https://example.org/x"
    assert message["text"] == "was-search s stopped: patience: enough; 1 of 2 trials, perplexity 7.389"
    assert (message["event"], message["detail"]) == ("finished", "patience: enough")
    assert message["slots"] == {"total": 2, "waiting": 1, "running": 0, "complete": 1, "stopped": 0, "failed": 0}
    assert message["best_perplexity"] == pytest.approx(7.389, abs=1e-3)


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (StorageError("cannot reach postgresql://ada:s3cret@h/db\nmore"), "cannot reach postgresql://***@h/db"),
        (StudyError("study 's' was deleted"), "study 's' was deleted"),
        (RuntimeError("internal words"), "RuntimeError"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_failures_are_sent_and_go_on(context, sent, error, detail) -> None:
    with pytest.raises(type(error)), announced(context):
        raise error
    assert [(m["event"], m["detail"]) for _, m in sent] == [("failed", detail)]
    assert context.announcement is None


def test_nothing_is_sent_where_nobody_asked(context, sent) -> None:
    context.settings = Settings()
    with announced(context):
        pass
    assert sent == []


def test_messages_hold_json_only() -> None:
    slots = [Slot(0, SlotState.COMPLETE, loss_nats=2000.0, nll_nats=2000.0)]
    found = payload(Announcement("s", slots), Ending())
    assert found["best_perplexity"] is None  # beyond a float
    json.dumps(found, allow_nan=False)
