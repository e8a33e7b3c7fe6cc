"""Which of the contenders is exported."""

from __future__ import annotations

import math

import pytest

from was_search.service.steps.exporting import least


@pytest.mark.parametrize(
    ("losses", "winner"),
    [([2.0, 1.0, 3.0], 1), ([math.nan, 5.0], 1), ([5.0, math.nan], 0), ([math.inf, math.nan], 0), ([math.nan] * 2, 0)],
)
def test_a_loss_that_is_no_number_never_wins(losses, winner):
    assert least(losses) == winner
