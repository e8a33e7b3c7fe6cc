"""What is said of a limit; the run itself is in test_several.py."""

from __future__ import annotations

import pytest

from was_search.errors import ConfigError
from was_search.service.context import Context
from was_search.service.reports.max_increase import conclusion
from was_search.service.settings import Settings
from was_search.service.targets.max_increase import run_max_increase
from was_search.vectors.bracket import find_highest


def test_a_closed_bracket_names_both_sides() -> None:
    found = conclusion(find_highest(lambda t: 0.0002 * 2 ** (t * 15), 0.05))
    assert found.startswith("target 52.")
    assert "% is inside the limit of 5 %: +4." in found
    assert "on the search split; 53." in found  # 5 % is at 53.1 %
    assert "% is outside: +5." in found


def test_even_the_lowest_is_outside() -> None:
    found = conclusion(find_highest(lambda t: 1.0 + t, 0.05))
    assert found == (
        "even the lowest target tried, 5 %, is outside the limit of 5 %: +105.00 %; allow more, or search with more "
        "trials"
    )


def test_even_the_highest_is_inside() -> None:
    found = conclusion(find_highest(lambda t: 0.01 * t, 0.05))
    assert found == (
        "target 90 % is inside the limit of 5 %: +0.90 % on the search split; that is the highest target tried for"
    )


def test_a_bracket_left_open_says_how_wide_it_is() -> None:
    found = conclusion(find_highest(lambda t: 0.2 * t, 0.05, max_probes=2))
    assert "after 2 probes" in found
    assert "points between them are left open" in found


def test_nothing_higher_was_tried() -> None:
    assert conclusion(find_highest(lambda t: 0.0, 0.05, max_probes=1)).endswith("; nothing higher was tried")


def test_a_limit_is_needed() -> None:
    with pytest.raises(ConfigError, match="max_ppl_increase: missing; give --max-ppl-increase"):
        run_max_increase(Context(Settings()))
