"""What users may ask for besides one target: several targets or speed-ups, or the most within a loss of quality."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from was_search.errors import ConfigError

LOWEST_TARGET, HIGHEST_TARGET = 0.05, 0.9
"""Bounds of the search for the highest sparsity within a limit."""


def parse_targets(text: str) -> tuple[float, ...]:
    """Budgets from ``0.4,0.5,0.6``, in rising order; () for "".

    Raises:
        ConfigError: something that is no number in (0, 0.95), or a budget given twice.
    """
    if not text:
        return ()
    found = []
    for written, value in _numbers(text, "targets", "0.4,0.5"):
        if not 0.0 < value < 0.95:
            raise ConfigError(f"targets: each must be above 0 and below 0.95{percent_hint(value)}, got {written}")
        found.append(value)
    # Studies are told apart by their targets to a hundredth of a percentage point.
    rounded = [round(value, 4) for value in found]
    twice = sorted({value for value in rounded if rounded.count(value) > 1})
    if twice:
        raise ConfigError(f"targets: each may be given once, got {', '.join(f'{v:g}' for v in twice)} more than once")
    return tuple(sorted(found))


def _numbers(text: str, option: str, example: str) -> Iterator[tuple[str, float]]:
    """What stands between the commas of ``text``, as it is written and as a number."""
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise ConfigError(
                f"{option}: must be numbers with commas between, such as {example}, got {text!r}"
            ) from None
        yield part.strip(), value


def percent_hint(value: float) -> str:
    """A hint in brackets for a share that was given in percent, with what to write; "" for other numbers."""
    return f" (for {value:g} % write {value / 100:g})" if 5.0 <= value < 95.0 else ""


def parse_speedups(text: str) -> tuple[float, ...]:
    """Speed-ups from ``1.5,1.8,2.0``, in rising order; () for "".

    Raises:
        ConfigError: something that is no number above 1, or a speed-up given twice.
    """
    if not text:
        return ()
    found = []
    for written, value in _numbers(text, "target_speedups", "1.5,2"):
        if not 1.0 < value < math.inf:
            raise ConfigError(f"target_speedups: each must be above 1, got {written}")
        found.append(value)
    if len(set(found)) < len(found):
        raise ConfigError(f"target_speedups: each may be given once, got {text!r}")
    return tuple(sorted(found))


def target_words(identity: Mapping[str, Any]) -> str:
    """What a study with this ``identity`` is to reach, in short: ``60 %`` or ``1.8x``."""
    if "target speed-up" in identity:
        return f"{float(identity['target speed-up']):g}x"
    return f"{100 * float(identity.get('target', 0)):g} %"


def target_sentence(identity: Mapping[str, Any]) -> str:
    """:func:`target_words`, with what it is a share or a multiple of."""
    if "target speed-up" in identity:
        return f"{target_words(identity)} the dense step's speed, predicted by profile {str(identity['profile'])[:8]}"
    return f"{target_words(identity)} of the seven projections' weights"


def parse_increase(text: str) -> float | None:
    """The limit on the increase of perplexity as a fraction, from ``5%`` or ``0.05``; None for "".

    A number without % must be below 1: ``5`` could mean 5 % or fivefold.

    Raises:
        ConfigError: neither a percentage nor a fraction.
    """
    if not text:
        return None
    written = text.strip()
    percent = written.endswith("%")
    try:
        value = float(written.removesuffix("%")) / (100.0 if percent else 1.0)
    except ValueError:
        value = math.nan
    if not (0.0 < value < math.inf and (percent or value < 1.0)):
        raise ConfigError(
            f"max_ppl_increase: must be a percentage such as 5% or a fraction in (0, 1) such as 0.05, got {text!r}"
        )
    return value
