"""The short chaos run: a fault of almost every kind on one small study. The long one is ``make chaos``."""

from __future__ import annotations

import random

import pytest

from tests.chaos.cluster import Plan
from tests.chaos.run import chaos

KINDS = (
    "second coordinator",
    "kill worker",
    "delay a reply",
    "cut a transaction",
    "restart Postgres, immediate",
    "kill node",
    "cut all connections",
    "kill coordinator",
)


@pytest.mark.ray
@pytest.mark.postgres
@pytest.mark.slow(seconds=120)
@pytest.mark.timeout(1800)
def test_a_fault_of_each_kind_loses_and_doubles_nothing() -> None:
    summary, hits = chaos(Plan(trials=24, workers=2, trial_timeout=10.0), KINDS, random.Random(0))
    assert [hit.fault for hit in hits] == list(KINDS)
    assert summary.slots == 24
    assert summary.attempts > summary.slots, "no evaluation was handed out twice: the faults struck nothing"
