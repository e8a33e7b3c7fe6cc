"""Texts and marks on streams of every encoding: nothing raises, and what is written says what was meant."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from was_search.process.logs import JsonLines
from was_search.process.streams import forgiving
from was_search.service.cli import main
from was_search.service.reports.progress import JsonReporter, Reporter, RichReporter
from was_search.service.steps.demonstration import DEMO_FOLDER

ENCODINGS = ("ascii", "latin-1", "cp437", "shift_jis", "utf-8")
TEXT = "é ✓ ± — “x” 你 😀 \udcff [m] ⠋"
MODEL = str(DEMO_FOLDER / "model")
IN_ASCII = r"\u00e9 + +- - 'x' \u4f60 \ud83d\ude00 \udcff [m] *"


class Stream(io.TextIOWrapper):
    """A stream of the process as Python opens it: strict, with an encoding that the environment names."""

    def __init__(self, encoding: str, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def shown(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def terminal(request):
    return request.param


@pytest.fixture(params=ENCODINGS)
def streams(request, terminal, monkeypatch):
    """Puts two streams of one encoding in the process's place; called by the test itself, since pytest has its own."""

    def put() -> tuple[Stream, Stream]:
        made = Stream(request.param, terminal), Stream(request.param, terminal)
        monkeypatch.setattr(sys, "stdout", made[0])
        monkeypatch.setattr(sys, "stderr", made[1])
        return made

    return put


def test_a_stream_takes_every_character(streams):
    put = streams()
    forgiving()
    for stream in put:
        stream.write(TEXT)
        shown = stream.shown()
        assert "[m]" in shown and "\\udcff" in shown  # half of a pair: no encoding has it
        if stream.encoding == "ascii":
            assert shown == IN_ASCII
        if stream.encoding == "utf-8":
            assert shown == TEXT.replace("\udcff", r"\udcff")


def use(reporter: Reporter) -> None:
    with reporter.phase(f"calibrate on {TEXT}", 2) as advance:
        advance()
    with reporter.search(TEXT, TEXT):
        pass
    reporter.cached(TEXT, TEXT, 0.5)
    reporter.note(TEXT)
    reporter.table(TEXT, ["", TEXT], [[TEXT, TEXT]], caption=TEXT)
    with reporter.live() as show:
        show(TEXT, [[TEXT, TEXT]], TEXT)
    reporter.text(TEXT)
    reporter.result({"text": TEXT})


def test_reports_reach_every_stream(streams):
    out, _ = streams()
    forgiving()
    use(RichReporter(Console(highlight=False, emoji=False, width=200)))
    use(Reporter())
    shown = out.shown()
    assert "calibrate on" in shown
    if out.encoding == "ascii":
        assert IN_ASCII in shown and "✓" not in shown


def test_json_stays_json(streams):
    out, err = streams()
    forgiving()
    use(JsonReporter())
    texts = [line.get("text") for line in map(json.loads, out.shown().splitlines())]
    assert TEXT in texts
    record = logging.LogRecord("was_search.x", logging.WARNING, "", 0, TEXT, None, None)
    sys.stderr.write(JsonLines().format(record) + "\n")
    assert json.loads(err.shown())["message"].startswith("é")


@pytest.mark.parametrize("streams", ["ascii", "latin-1"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "/nö/✓", "--prompt", "x"], "must be a checkpoint's folder"),
        (
            ["evaluate", "--model", MODEL, "--data", "/tëxt/✓.txt", "--sequence-length", "64"],
            "data:",
        ),
        (["--help"], "Usage"),
        (["generate", "--fóo"], "Usage"),
    ],
)
def test_commands_end_in_words(streams, monkeypatch, arguments, words):
    """Errors, usage and help: click and rich write these on streams of their own choice."""
    monkeypatch.setattr(sys, "argv", ["was-search", *arguments])
    put = streams()
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code in (0, 1, 2)
    shown = ""
    for stream in put:
        with suppress(UnicodeDecodeError):  # click writes UTF-8 where a stream says ASCII
            shown += stream.shown()
    assert words in shown and "Traceback" not in shown


def test_streams_of_others_are_left_alone(monkeypatch):
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    monkeypatch.setattr(sys, "stderr", None)
    forgiving()
    assert sys.stdout is other


def test_reading_is_not_forgiven():
    forgiving()
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", "was_search.instead")


@pytest.mark.slow  # a process of its own, which loads the model
def test_a_process_with_such_streams():
    """What a batch system starts: the phases' marks, the generated text, a table, an error, and no traceback."""
    root = Path(__file__).parents[3]
    generate = ["generate", "--model", MODEL, "--device", "cpu", "--max-new-tokens", "3"]
    found = subprocess.run(
        [sys.executable, "-m", "was_search", *generate, "--prompt", "# é ✓ 你"],
        capture_output=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    shown = found.stdout.decode("latin-1")
    assert found.returncode == 0, found.stderr.decode("latin-1")
    assert "+ load the model" in shown and r"# é + \u4f60" in shown
