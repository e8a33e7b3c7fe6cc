"""Logs: one line an event, with the ids of study, slot, attempt, trial and worker, for people or for machines.

Nothing is shown below warnings until :func:`configure` is called. Every line passes through
:func:`was_search.process.redaction.redacted`.

State of the whole process that our packages change, beyond what a block puts back at its end:

- Logging: :func:`configure` sets the handlers of our packages' loggers and what :func:`configured` gives. Optuna's
  logger shows warnings and above once ``was_search.studies.sampling`` is imported, those of Ray's job client once a
  ``was_workers.jobs.Jobs`` is made. ``was_workers.draining`` remembers that it has given its warning.
- The environment: ``was_workers.cluster.connect`` sets ``RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO`` where it is not set. It
  also keeps Ray from printing what its own processes say.
- Standard output and error, in the command's own process: ``was_search.process.streams.forgiving``.
- In a worker's own process, the number of torch's threads.

Signals have their handlers inside the blocks of ``was_search.process.signals`` only.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from was_search.errors import ConfigError
from was_search.process.redaction import redacted

FORMATS = ("text", "json")
PACKAGES = ("was_search", "was_storage", "was_workers", "was_kernels")
IDS = ("study", "phase", "epoch", "chain", "part", "slot", "attempt", "trial", "worker")
"""Names of the ids that an event may have, in the order in which text shows them."""

_bound: ContextVar[Mapping[str, Any]] = ContextVar("was_search_log_fields", default={})  # noqa: B039 - never changed
_format = ""


def configure(log_format: str, stream: TextIO | None = None) -> None:
    """Write our packages' events and warnings to ``stream`` (standard error); "" leaves logging as it is.

    Calling it again replaces the format.

    Raises:
        ConfigError: another format.
    """
    global _format
    if not log_format:
        return
    if log_format not in FORMATS:
        raise ConfigError(f"log_format: must be one of {', '.join(FORMATS)}, got {log_format!r}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    _format = log_format


def configured() -> str:
    """The format that :func:`configure` was called with; "" before."""
    return _format


def event(logger: logging.Logger, name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log that ``name`` has happened, with ``fields`` and those that are bound; None fields are left out."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": {**_bound.get(), **fields}})


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Add ``fields`` to every line inside the block."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def bound_fields() -> dict[str, Any]:
    """The fields that are bound here, for binding them in another process."""
    return dict(_bound.get())


class JsonLines(logging.Formatter):
    """A JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``event``, the ids, and further fields.

    A line that is no event, such as a warning, has "message" as its ``event`` and its words in ``message``.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        is_event = hasattr(record, "fields")
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage() if is_event else "message",
            **({} if is_event else {"message": record.getMessage()}),
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        clean = {key: redacted(value) if isinstance(value, str) else value for key, value in line.items()}
        return json.dumps(clean, ensure_ascii=False, default=str, allow_nan=False)


class TextLines(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO slot finished study=a slot=3``; text with blanks is quoted."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_shown(value)}" for key, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname} {_one_line(record.getMessage())} {fields}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redacted(line)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {**_bound.get(), **getattr(record, "fields", {})}
    ordered = sorted(fields.items(), key=lambda item: IDS.index(item[0]) if item[0] in IDS else len(IDS))
    return {key: _plain(value) for key, value in ordered if value is not None}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    return value if isinstance(value, bool | int | str) else str(value)


def _shown(value: Any) -> str:
    text = str(value)
    plain = text.isprintable() and text and not any(c in text for c in " \"'=")
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())


def _one_line(text: str) -> str:
    """``text`` as one line, so that a message cannot look like another line, nor steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
