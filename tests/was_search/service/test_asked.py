from __future__ import annotations

import re

import pytest

from was_search.errors import ConfigError
from was_search.service.asked import parse_increase, parse_targets


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("0.5", (0.5,)), ("0.4,0.5, 0.6", (0.4, 0.5, 0.6)), ("0.7,0.4", (0.4, 0.7)), (".5,5e-2", (0.05, 0.5))],
)
def test_targets_in_rising_order(text: str, expected: tuple[float, ...]) -> None:
    assert parse_targets(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.4;0.5", "targets: must be numbers with commas between, such as 0.4,0.5, got '0.4;0.5'"),
        ("0.4,", "targets: must be numbers with commas between, such as 0.4,0.5, got '0.4,'"),
        ("40%", "targets: must be numbers with commas between"),
        ("0.4,0.95", "targets: each must be above 0 and below 0.95, got 0.95"),
        ("0,0.5", "targets: each must be above 0 and below 0.95, got 0"),
        ("nan", "targets: each must be above 0 and below 0.95, got nan"),
        ("40,50", "targets: each must be above 0 and below 0.95 (for 40 % write 0.4), got 40"),
        ("0.5,1.2", "targets: each must be above 0 and below 0.95, got 1.2"),
        ("0.7,0.5,0.5", "targets: each may be given once, got 0.5 more than once"),
        ("0.50001,0.5", "targets: each may be given once, got 0.5 more than once"),
    ],
)
def test_bad_targets(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        parse_targets(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5%", 0.05), ("0.05", 0.05), (" 5 % ", 0.05), ("0.5%", 0.005), ("150%", 1.5), ("1e-3", 0.001)],
)
def test_increase(text: str, expected: float) -> None:
    assert parse_increase(text) == pytest.approx(expected, rel=1e-15)


def test_no_increase() -> None:
    assert parse_increase("") is None


@pytest.mark.parametrize("text", ["5", "1", "0", "0%", "-5%", "five", "%", "5%%", "nan", "nan%", "inf%", " "])
def test_bad_increase(text: str) -> None:
    rule = "max_ppl_increase: must be a percentage such as 5% or a fraction in (0, 1) such as 0.05"
    with pytest.raises(ConfigError, match="^" + re.escape(f"{rule}, got {text!r}") + "$"):
        parse_increase(text)
