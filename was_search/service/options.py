"""What an option of a run is: its type, default, rules and the words that every place shows of it.

``Settings`` declares its fields with :func:`setting`. The command line, the TOML file and ``docs/options.md`` are made
of what :func:`options_of` reads from there, so that none of them can say something else.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from was_search.errors import ConfigError

_T = TypeVar("_T")
_MOST = 2**63
"""No option has as large a number: what counts on, stores or sends it has its own limits, which would be met late."""

KIND_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Group(StrEnum):
    """Options that belong together: a command takes whole groups, and help and page show each under its name."""

    MODEL = "Model"
    TEXT = "Text"
    CALIBRATION = "Calibration"
    TARGET = "Target"
    TARGETS = "Several targets"
    SEEDS = "Seed vectors"
    SEARCH = "Search"
    DESCENTS = "Descents"
    COMPENSATION = "Compensation"
    LIMITS = "Limits"
    CLUSTER = "Cluster"
    FAILURES = "Failing and slow workers"
    PLAN = "Plan"
    STORAGE = "General"


@dataclass(frozen=True)
class Rule:
    """A rule that an option's value must meet.

    Attributes:
        words: the rule as it stands in an error's message, such as ``must be at least 1``.
        met: whether a value meets it; the second argument is all the settings, for rules about two options.
        hint: what a message adds about a value, "" for nothing.
    """

    words: str
    met: Callable[[Any, Any], bool]
    hint: Callable[[Any], str] = lambda value: ""


def at_least(least: int, unit: str = "") -> Rule:
    return Rule(f"must be at least {least}{unit}", lambda value, _: value >= least)


def checked_by(parse: Callable[[str], object]) -> Callable[[str], str]:
    """A ``parse`` for :func:`setting` that checks text with ``parse`` and keeps it as given; "" is not checked."""

    def check(text: str) -> str:
        if text:
            parse(text)
        return text

    return check


def setting(
    default: _T,
    group: Group,
    help: str,
    *rules: Rule,
    parse: Callable[[Any], Any] | None = None,
    env: str = "",
    secret: str = "",
) -> _T:
    """A field of ``Settings``.

    Args:
        default: its value where nothing gives one.
        group: the group it belongs to.
        help: what it is, in one sentence or two, for the command line and the page.
        rules: what its values must meet besides their type. A ``Literal`` type is a rule by itself.
        parse: gives a value's canonical form, and raises a ConfigError for one that has none.
        env: the environment variable that gives it where no flag does.
        secret: for one that may hold a password: what is shown instead of its value. It is left out of ``repr``.
    """
    metadata = {"group": group, "help": help, "rules": rules, "parse": parse, "env": env, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One option as every place sees it: what :func:`setting` was given, with its kind and choices.

    Attributes:
        kind: bool, int, float or str; None where ``parse`` reads values of several types.
        choices: the values of a ``Literal``; () for any others.
    """

    name: str
    kind: type | None
    choices: tuple[str, ...]
    default: Any
    group: Group
    help: str
    rules: tuple[Rule, ...]
    parse: Callable[[Any], Any] | None
    env: str
    secret: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def shown(self, value: Any) -> Any:
        """``value`` as it may be stored and shown: of a secret, only whether it is the default."""
        return self.secret if self.secret and value != self.default else value

    def canonical(self, value: Any) -> Any:
        """``value`` with the option's type, in its canonical form.

        Raises:
            ConfigError: another type, or text that cannot be read.
        """
        found = value if self.kind is None else self._typed(self.kind, value)
        return found if self.parse is None else self.parse(found)

    def check(self, value: Any, settings: Any) -> None:
        """Raise a ConfigError with the first rule that ``value`` does not meet among the ``settings``."""
        choice = Rule(f"must be one of {', '.join(self.choices)}", lambda value, _: value in self.choices)
        for rule in (choice, *self.rules) if self.choices else self.rules:
            if not rule.met(value, settings):
                raise ConfigError(f"{self.name}: {rule.words}{rule.hint(value)}, got {value!r}")

    def _typed(self, kind: type, value: Any) -> Any:
        allowed = (int, float) if kind is float else kind
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed) or value != value:
            raise ConfigError(f"{self.name}: must be {KIND_WORDS[kind]}, got {value!r}")
        if isinstance(value, int) and kind is int and abs(value) >= _MOST:
            got = value if abs(value) < _MOST**2 else "one of more than 37 digits"
            raise ConfigError(f"{self.name}: must be a whole number under 2^63, got {got}")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{self.name}: must be without NUL characters, got {value[:80]!r}")
        try:
            return kind(value)
        except OverflowError:
            raise ConfigError(f"{self.name}: must be a number that fits a float, got {str(value)[:8]}...") from None


def options_of(settings: type) -> dict[str, Option]:
    """The options that a dataclass of :func:`setting` fields declares, by name and in their order."""
    hints = typing.get_type_hints(settings)
    return {field.name: _option(field, hints[field.name]) for field in dataclasses.fields(settings)}


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    kind = str if choices else hint if isinstance(hint, type) else None
    return Option(field.name, kind, choices, field.default, **field.metadata)
