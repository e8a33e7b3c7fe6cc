"""Log lines: their fields, their order, and what never stands in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from was_search.errors import ConfigError
from was_search.process import logs
from was_search.process.logs import bound, bound_fields, configure, event
from was_search.service.cli.main import app

_logger = logging.getLogger("was_workers.somewhere")


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as it was before the test."""
    monkeypatch.setattr(logs, "_format", "")
    before = {}
    for name in logs.PACKAGES:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers, logger.level, logger.propagate)
    yield
    for name, (handlers, level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(log_format: str) -> io.StringIO:
    stream = io.StringIO()
    configure(log_format, stream)
    return stream


def test_an_event_as_json() -> None:
    stream = lines("json")
    with bound(study="a study"):
        event(_logger, "slot finished", worker="w@h:1", slot=3, loss_nats=np.float64(2.123456789), trial=None)
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "was_workers.somewhere",
        "event": "slot finished",
        "study": "a study",
        "slot": 3,
        "worker": "w@h:1",
        "loss_nats": 2.123457,
    }
    assert list(line)[3:6] == ["study", "slot", "worker"]


def test_an_event_as_text() -> None:
    stream = lines("text")
    event(_logger, "slot put back", reason="it died", worker="w@h:1", slot=3, study="a b")
    (line,) = stream.getvalue().splitlines()
    assert line.split(" ", 1)[1] == 'INFO slot put back study="a b" slot=3 worker=w@h:1 reason="it died"'


def test_warnings_get_what_is_bound_and_errors_their_traceback() -> None:
    stream = lines("json")
    with bound(study="s", slot=1):
        _logger.warning("%s was lost", "it")
    try:
        raise ValueError("at postgresql://me:s3cret@host/db")
    except ValueError:
        _logger.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["message"], first["slot"], first["level"]) == ("message", "it was lost", 1, "warning")
    assert "ValueError: at postgresql://***@host/db" in second["traceback"]
    assert bound_fields() == {}


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_password_and_no_second_line(log_format: str) -> None:
    stream = lines(log_format)
    event(_logger, "x", error="cannot reach postgresql://me:s3cret@host/db?password=s3cret", study="a\nb\x1b[2J")
    _logger.warning("one\ntwo\x1b[31m postgresql://me:s3/cr@et@host/db")
    text = stream.getvalue()
    assert len(text.splitlines()) == 2
    assert "s3cret" not in text and "cr@et" not in text
    assert "\x1b" not in text


def test_numbers_that_json_has_not() -> None:
    stream = lines("json")
    event(_logger, "x", loss_nats=float("nan"), seconds=float("inf"), stopped_early=True)
    line = json.loads(stream.getvalue(), parse_constant=lambda name: pytest.fail(name))
    assert (line["loss_nats"], line["seconds"], line["stopped_early"]) == ("nan", "inf", True)


def test_nothing_is_said_before_it_is_configured(capsys: pytest.CaptureFixture[str]) -> None:
    configure("")
    event(_logger, "slot finished", slot=1)
    assert logs.configured() == ""
    assert capsys.readouterr().err == ""


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="log_format: must be one of text, json, got 'xml'"):
        configure("xml")
    result = CliRunner().invoke(app, ["studies", "--log-format", "xml"])
    assert isinstance(result.exception, ConfigError)
    result = CliRunner().invoke(app, ["studies"], env={"WAS_SEARCH_LOG_FORMAT": "xml"})
    assert isinstance(result.exception, ConfigError)
