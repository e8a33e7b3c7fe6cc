"""What users may ask for besides one target: several targets, or the most sparsity within a loss of quality."""

from __future__ import annotations

import math

from was_search.errors import ConfigError

LOWEST_TARGET, HIGHEST_TARGET = 0.05, 0.9
"""Where the search for the highest sparsity within a limit looks."""


def parse_targets(text: str) -> tuple[float, ...]:
    """Budgets from ``0.4,0.5,0.6``, in rising order; () for "".

    Raises:
        ConfigError: something that is no number in (0, 0.95), or a budget given twice.
    """
    if not text:
        return ()
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise ConfigError(f"targets: must be numbers with commas between, such as 0.4,0.5, got {text!r}") from None
        if not 0.0 < value < 0.95:
            raise ConfigError(f"targets: each must be above 0 and below 0.95, got {part.strip()}")
        found.append(value)
    # Studies are told apart by their targets to a hundredth of a percentage point.
    rounded = [round(value, 4) for value in found]
    twice = sorted({value for value in rounded if rounded.count(value) > 1})
    if twice:
        raise ConfigError(f"targets: each may be given once, got {', '.join(f'{v:g}' for v in twice)} more than once")
    return tuple(sorted(found))


def parse_increase(text: str) -> float | None:
    """The limit on the increase of perplexity as a fraction, from ``5%`` or ``0.05``; None for "".

    A number without % must be below 1: ``5`` could mean 5 % or fivefold.

    Raises:
        ConfigError: none of these.
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
