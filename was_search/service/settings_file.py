"""A run's settings from its defaults, a TOML file and flags, in this order; the last one wins."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from was_search.errors import ConfigError
from was_search.process.close_names import did_you_mean
from was_search.process.regular_files import read_regular
from was_search.service.settings import OPTIONS, QUESTIONS, Settings, require_one_question

_MOST_BYTES = 1 << 20


def load_settings(file: Path | None, flags: dict[str, Any], base: Settings | None = None) -> Settings:
    """Settings from ``base`` (or the defaults), ``file`` (TOML) and the ``flags`` that are not None; the last wins.

    Option names in the file are written with - or _.

    Raises:
        ConfigError: an unreadable file, an unknown option, or a value outside its range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            document = tomllib.loads(_read(file).decode())
        except OSError as error:
            raise ConfigError(f"config: cannot read {file} ({error.strerror})") from error
        except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, thousands of digits, nested without end
            raise ConfigError(f"config: {file} is not valid TOML: {error}") from error
        values = {key.replace("-", "_"): value for key, value in document.items()}
    unknown = sorted(set(values) - OPTIONS.keys())
    if unknown:
        raise ConfigError(
            f"config: unknown option {', '.join(unknown)}; known: {', '.join(sorted(OPTIONS))}"
            f"{did_you_mean(unknown[0], OPTIONS)}"
        )
    given = {key: value for key, value in flags.items() if value is not None}
    for source in (values, given):
        require_one_question(source)
    if any(given.get(name) for name in QUESTIONS):  # a flag's question replaces the file's
        values = {key: value for key, value in values.items() if key not in QUESTIONS}
        given = {**{name: getattr(Settings, name) for name in QUESTIONS[1:]}, **given}
    values.update(given)
    return dataclasses.replace(base, **values) if base is not None else Settings(**values)


def _read(file: Path) -> bytes:
    """The file's bytes; also those of a pipe that a shell has made, as of ``--config <(...)``."""
    if not file.resolve().name.startswith("pipe:["):
        return read_regular(file, _MOST_BYTES)
    with file.open("rb") as pipe:
        return pipe.read(_MOST_BYTES)
