"""Limits, what is counted for them, and what can be set."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from was_search.errors import ConfigError
from was_search.studies.control import NO_LIMITS, Ending, EndingKind, Limits, Overrides, Spent, Tally, Wish, limits_of
from was_search.studies.slots import Slot, SlotState

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def slot(number: int, state: SlotState, loss: float | None = None, *, minute: int | None = None) -> Slot:
    finished = NOON + timedelta(minutes=number if minute is None else minute)
    return Slot(number, state, loss_nats=loss, finished_at=finished if state.finished else None)


def test_a_tally_follows_the_order_in_which_slots_finished() -> None:
    slots = [
        slot(0, SlotState.COMPLETE, 3.0, minute=9),
        slot(1, SlotState.COMPLETE, 2.0, minute=1),
        slot(2, SlotState.FAILED, minute=2),
        slot(3, SlotState.STOPPED, 1.0, minute=3),  # stopped ones are never best
        slot(4, SlotState.RUNNING),
        slot(5, SlotState.WAITING),
    ]
    tally = Tally.of(slots)
    assert (tally.failures, tally.since_best, tally.best_loss_nats) == (1, 3, 2.0)
    tally.add(slot(4, SlotState.COMPLETE, 1.9))
    assert tally.since_best == 0


def test_before_a_complete_slot_there_is_nothing_to_be_patient_about() -> None:
    tally = Tally.of([slot(n, SlotState.FAILED) for n in range(4)])
    assert (tally.failures, tally.since_best) == (4, 0)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_seconds=10.0), "max_seconds: 10 s of searching, the limit is 10 s"),
        (Limits(max_gpu_seconds=40.0), "max_gpu_seconds: 40 GPU seconds"),
        (Limits(max_failures=2), "max_failures: 2 trial"),
        (Limits(patience=5), "patience: no better loss in 5 finished trials"),
        (Limits(10.1, 40.1, 3, 6), ""),
        (NO_LIMITS, ""),
    ],
)
def test_each_rule_is_met_at_its_number(limits: Limits, words: str) -> None:
    found = limits.met(Spent(10.0, 40.0), Tally(failures=2, since_best=5, best_loss_nats=1.0))
    assert found.startswith(words)
    assert bool(found) == bool(words)


def test_what_was_set_goes_before_the_run_and_zero_lifts() -> None:
    own = Limits(max_seconds=10.0, patience=3)
    assert Overrides(max_seconds=0, max_failures=7, workers=2).limits(own) == Limits(max_failures=7, patience=3)
    assert Overrides().limits(own) == own
    assert Overrides(max_seconds=0.0).given == {"max_seconds": 0.0}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("trials", 0, "trials: must be at least 1, got 0"),
        ("trials", 10**7, "trials: must be at most 1000000"),
        ("workers", -2, "workers: must be at least 1, got -2"),
        ("max_seconds", -1.0, "max_seconds: must be a number and not negative"),
        ("max_seconds", math.nan, "max_seconds: must be a number"),
        ("max_gpu_seconds", math.inf, "max_gpu_seconds: must be a number"),
        ("max_failures", -1, "max_failures: must be a number and not negative"),
        ("patience", 2**40, "patience: must be at most"),
    ],
)
def test_numbers_that_cannot_be_asked_for(name: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        Overrides(**{name: value})


def test_time_is_shared_with_other_studies_and_counts_are_not() -> None:
    limits = Limits(max_seconds=30.0, max_gpu_seconds=100.0, max_failures=2, patience=5)
    tally = Tally(failures=1, since_best=4, best_loss_nats=1.0)
    assert limits.met(Spent(10.0, 40.0), tally, Spent(19.0, 59.0)) == ""
    found = limits.met(Spent(10.0, 40.0), tally, Spent(20.0, 0.0))
    assert found == "max_seconds: 30 s of searching for all targets, the limit is 30 s"
    found = limits.met(Spent(10.0, 40.0), tally, Spent(0.0, 60.0))
    assert found == "max_gpu_seconds: 100 GPU seconds for all targets, the limit is 100"


def test_a_limit_set_for_a_study_is_its_own() -> None:
    others = Spent(50.0, 70.0)
    assert Overrides().shared(others) == others
    assert Overrides(max_seconds=0).shared(others) == Spent(0.0, 70.0)
    assert Overrides(max_gpu_seconds=5, patience=3).shared(others) == Spent(50.0, 0.0)


def test_settings_of_an_older_version_have_no_limits() -> None:
    assert limits_of({"trials": 4}) == NO_LIMITS
    assert limits_of({"patience": 4, "max_seconds": 2.5, "model": "m"}) == Limits(max_seconds=2.5, patience=4)


def test_words_of_endings() -> None:
    assert str(Ending()) == "finished"
    assert str(Ending(EndingKind.STOPPED, "patience: x")) == "stopped: patience: x"
    assert [kind for kind in EndingKind if Ending(kind).interrupted] == [EndingKind.DRAINED, EndingKind.CANCELLED]
    assert [wish for wish in Wish if wish.ends] == [Wish.DRAIN, Wish.CANCEL]
