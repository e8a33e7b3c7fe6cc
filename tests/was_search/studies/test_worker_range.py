from __future__ import annotations

import re

import pytest

from was_search.errors import ConfigError
from was_search.service.settings import Settings
from was_search.studies.control import Overrides
from was_search.studies.pool_state import PoolState, Quarantined
from was_search.studies.worker_range import WorkerRange


@pytest.mark.parametrize(
    ("value", "least", "most", "plain"),
    [(4, 4, 4, 4), ("4", 4, 4, 4), ("2:64", 2, 64, "2:64"), (" 3:3 ", 3, 3, 3)],
)
def test_a_number_or_a_range(value, least, most, plain) -> None:
    found = WorkerRange.parse(value)
    assert (found.least, found.most, found.plain) == (least, most, plain)
    assert WorkerRange.parse(found.plain) == found
    assert Settings(workers=value).workers == plain
    assert Settings(workers=value).worker_range == found
    assert Overrides(workers=value).given == {"workers": plain}


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0, "must be at least 1, got 0"),
        ("-2", "must be at least 1, got -2"),
        ("0:4", "must be at least 1, got 0"),
        ("4:2", "the maximum must not be below the minimum, got 4:2"),
        ("2:", "must be a whole number, or MINIMUM:MAXIMUM such as 2:64, got '2:'"),
        ("1:2:3", "must be a whole number, or MINIMUM:MAXIMUM such as 2:64, got '1:2:3'"),
        (2.0, "must be a whole number, or MINIMUM:MAXIMUM such as 2:64, got 2.0"),
        (10**10, "must be at most 1000000000, got 10000000000"),
    ],
)
def test_anything_else_is_refused(value, rule) -> None:
    for refused in (WorkerRange.parse, lambda v: Settings(workers=v), lambda v: Overrides(workers=v)):
        with pytest.raises(ConfigError, match="^" + re.escape(f"workers: {rule}") + "$"):
            refused(value)


def test_the_nearest_number_within() -> None:
    assert [WorkerRange(2, 5).clamp(n) for n in (0, 2, 4, 5, 9)] == [2, 2, 4, 5, 5]


def test_a_pools_state_survives_json() -> None:
    state = PoolState("2:64", 2, 1, 61, 1, (Quarantined("worker-3@h:7", "slow", "2026-01-01T00:00:00+00:00"),))
    assert PoolState.from_json(state.to_json()) == state
    assert PoolState.from_json({}) == PoolState()
    assert state.counts == {"ready": 2, "loading": 1, "pending": 61, "draining": 1, "quarantined": 1}
