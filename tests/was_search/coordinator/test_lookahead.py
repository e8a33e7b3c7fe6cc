from __future__ import annotations

import pytest

from was_search.coordinator.lookahead import MIN_WORKERS, MOST, Lookahead


def measured(evaluation: float, choice: float) -> Lookahead:
    ahead = Lookahead()
    for _ in range(100):
        ahead.evaluated(evaluation)
        ahead.chose(choice)
    return ahead


def test_nothing_is_chosen_ahead_before_anything_is_known() -> None:
    ahead = Lookahead()
    assert ahead.depth(64) == 0
    ahead.chose(0.1)
    assert ahead.depth(64) == 0


@pytest.mark.parametrize(
    ("evaluation", "choice", "workers", "depth"),
    [
        (10.0, 0.03, 64, 1),  # 0.2 workers ask while one vector is chosen
        (10.0, 0.03, 512, 7),
        (60.0, 0.03, 512, 0),  # half a thousandth of a worker's time
        (3600.0, 0.2, 64, 0),
        (0.01, 0.1, 1000, MOST),
        (0.01, 0.1, MIN_WORKERS, 2),  # never more than a quarter of the pool
        (0.01, 0.1, MIN_WORKERS - 1, 0),
        (0.0, 0.1, 64, 16),
    ],
)
def test_depth_follows_from_what_was_measured(evaluation: float, choice: float, workers: int, depth: int) -> None:
    assert measured(evaluation, choice).depth(workers) == depth
