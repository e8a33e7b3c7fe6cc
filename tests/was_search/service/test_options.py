from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from was_search.errors import ConfigError
from was_search.service.options import Group, Rule, at_least, checked_by, options_of, setting


def _even(text: str) -> None:
    if len(text) % 2:
        raise ConfigError(f"pairs: must have pairs of letters, got {text!r}")


@dataclass(frozen=True)
class Kitchen:
    cups: int = setting(3, Group.TEXT, "Cups on the table.", at_least(1, " cup"))
    full: int = setting(
        1,
        Group.TEXT,
        "Cups that are full.",
        Rule("must be at most the cups", lambda value, given: value <= given.cups, lambda value: f" (not {value}!)"),
    )
    drink: Literal["tea", "milk"] = setting("tea", Group.MODEL, "What is in them.")
    warmth: float = setting(0.5, Group.MODEL, "How warm it is.")
    sugar: bool = setting(False, Group.MODEL, "Whether it is sweet.")
    pairs: str = setting("", Group.MODEL, "Letters.", parse=checked_by(_even), env="KITCHEN_PAIRS", secret="letters")
    guests: int | str = setting(1, Group.MODEL, "A number or a name.", parse=lambda value: str(value).strip())


OPTIONS = options_of(Kitchen)


def test_options_stand_in_the_order_of_the_fields_with_what_they_were_given():
    assert list(OPTIONS) == ["cups", "full", "drink", "warmth", "sugar", "pairs", "guests"]
    cups = OPTIONS["cups"]
    assert (cups.name, cups.kind, cups.default, cups.group) == ("cups", int, 3, Group.TEXT)
    assert (cups.help, cups.env, cups.flag) == ("Cups on the table.", "", "--cups")
    assert OPTIONS["pairs"].env == "KITCHEN_PAIRS"
    assert [option.kind for option in OPTIONS.values()] == [int, int, str, float, bool, str, None]


def test_the_dataclass_keeps_its_defaults_and_hides_secrets():
    assert (Kitchen().cups, Kitchen.cups, Kitchen(cups=4).full) == (3, 3, 1)
    assert "pairs" not in repr(Kitchen(pairs="secret"))


def test_of_a_secret_only_its_default_is_shown():
    assert [OPTIONS["pairs"].shown(value) for value in ("", "abab")] == ["", "letters"]
    assert OPTIONS["drink"].shown("milk") == "milk"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cups", 0, "cups: must be at least 1 cup, got 0"),
        ("full", 4, "full: must be at most the cups (not 4!), got 4"),
        ("drink", "rum", "drink: must be one of tea, milk, got 'rum'"),
    ],
)
def test_a_rule_says_itself_and_the_value(name: str, value: Any, message: str):
    with pytest.raises(ConfigError) as refused:
        OPTIONS[name].check(value, Kitchen())
    assert str(refused.value) == message


def test_a_rule_may_look_at_other_settings():
    OPTIONS["full"].check(4, Kitchen(cups=5))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cups", 1.0, "cups: must be a whole number, got 1.0"),
        ("cups", True, "cups: must be a whole number, got True"),
        ("sugar", 1, "sugar: must be true or false, got 1"),
        ("drink", 3, "drink: must be text, got 3"),
        ("warmth", "hot", "warmth: must be a number, got 'hot'"),
        ("pairs", "abc", "pairs: must have pairs of letters, got 'abc'"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, message: str):
    with pytest.raises(ConfigError) as refused:
        OPTIONS[name].canonical(value)
    assert str(refused.value) == message


def test_canonical_forms():
    warmth = OPTIONS["warmth"].canonical(1)
    assert warmth == 1.0
    assert isinstance(warmth, float)
    assert OPTIONS["pairs"].canonical("ab") == "ab"
    assert OPTIONS["guests"].canonical(2) == "2"
    assert OPTIONS["guests"].canonical(" ann ") == "ann"
