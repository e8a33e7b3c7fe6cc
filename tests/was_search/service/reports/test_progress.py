from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
from rich.console import Console

from was_search.service.reports import heartbeat
from was_search.service.reports.progress import (
    JsonReporter,
    QuietReporter,
    Reporter,
    RichReporter,
    _figures,
    _Quarantined,
)
from was_search.studies.pool_state import PoolState, Quarantined
from was_search.studies.slots import Slot, SlotState

PROTOCOL = "a.txt [search] sha256:01234567, 10 x 128 tokens"


@dataclass(frozen=True)
class State:
    total: int = 20
    finished: int = 0
    stopped: int = 0
    saved: float = 0.0
    failed: int = 0
    best: Slot | None = None
    current: Slot | None = None
    activity: str = ""
    pool: PoolState = field(default_factory=PoolState)


STATES = [
    State(),
    State(finished=1, best=(slot := Slot(3, SlotState.COMPLETE, loss_nats=1.25, nll_nats=1.25)), current=slot),
    State(finished=4, stopped=1, saved=0.125, failed=1, best=slot, current=Slot(7, SlotState.FAILED)),
]


@pytest.fixture
def rich():
    return RichReporter(Console(file=io.StringIO(), highlight=False, width=160))


def shown(reporter: RichReporter) -> str:
    return reporter.console.file.getvalue()


def use(reporter: Reporter) -> None:
    with reporter.phase(f"calibrate on {PROTOCOL}", 2) as advance:
        advance()
        advance()
    with reporter.search("study [/x]", PROTOCOL) as show:
        for state in STATES:
            show(state)
    reporter.cached("price [q]", PROTOCOL, 0.5)
    reporter.note("plan: /data/[/x]/plan :dog:")
    reporter.table("Title [t]", ["", "[c]"], [["[search]", "[/]"]], caption=PROTOCOL)
    reporter.result({"a": 1})
    reporter.text("generated [search] :dog:")


def test_square_brackets_are_shown(rich):
    """Protocols, study names and paths hold them; taken for markup they would vanish or be an error."""
    use(rich)
    text = shown(rich)
    assert f"calibrate on {PROTOCOL}" in text
    assert f"study study [/x], losses on {PROTOCOL}" in text
    assert f"price [q]: cached ({PROTOCOL}, 0.50 s)" in text
    assert "plan: /data/[/x]/plan :dog:" in text
    assert "Title [t]" in text
    assert "[c]" in text
    assert "[search]" in text
    assert "generated [search] :dog:" in text


def test_the_search_line(rich):
    with rich.search("s", PROTOCOL) as show:
        for state in STATES:
            show(state)
    text = shown(rich)
    assert "search 4/20 trials, best 1.2500 nats (ppl 3.490, #3)" in text
    assert "25 % stopped early (12 % of the tokens saved), 1 failed" in text


def test_the_search_line_of_a_divergence(rich):
    """The perplexity is that of the text: exp of a divergence is none."""
    best = Slot(3, SlotState.COMPLETE, loss_nats=0.25, nll_nats=1.25)
    with rich.search("s", PROTOCOL, "kl") as show:
        show(State(finished=1, best=best, current=best))
    assert "best 0.2500 nats of KL (ppl 3.490, #3)" in shown(rich)


def test_json_of_a_divergence(capsys):
    best = Slot(3, SlotState.COMPLETE, loss_nats=0.25, nll_nats=1.25)
    with JsonReporter().search("s", PROTOCOL, "kl") as show:
        show(State(finished=1, best=best, current=best))
    event = json.loads(capsys.readouterr().out)
    assert (event["fitness"], event["best_loss_nats"], event["best_nll_nats"]) == ("kl", 0.25, 1.25)


def test_a_search_that_shows_nothing(rich):
    with rich.search("s", PROTOCOL):
        pass
    assert "trials" not in shown(rich)


def test_a_loss_beyond_every_perplexity(rich):
    with rich.search("s", PROTOCOL) as show:
        show(replace(STATES[1], best=Slot(3, SlotState.COMPLETE, loss_nats=5000.0, nll_nats=5000.0)))
    assert "best 5000.0000 nats (ppl inf, #3)" in shown(rich)


def test_a_phase_that_fails_is_not_marked_done(rich):
    with pytest.raises(RuntimeError, match="inside"), rich.phase("calibrate"):
        raise RuntimeError("inside")
    assert "✓" not in shown(rich)


SICK = PoolState("4", ready=3, quarantined=(Quarantined("worker-1@h:7", "slow, 9 times", "2026-01-01T00:00:00"),))


def test_a_phase_shows_workers_in_quarantine(rich) -> None:
    state = [PoolState("4", ready=4)]
    with rich.phase("calibrate", 2, lambda: state[0]) as advance:
        advance()
        state[0] = SICK
    assert re.search(r"calibrate \d+\.\d s, 1 worker\(s\) in quarantine\n", shown(rich))
    with rich.phase("price", 2, lambda: PoolState("4", ready=4)):
        pass
    assert re.search(r"price \d+\.\d s\n", shown(rich))


def test_a_bar_asks_for_them_while_the_phase_waits() -> None:
    column = _Quarantined(lambda: SICK)
    assert column.render(None).plain == "1 worker(s) in quarantine"
    assert _Quarantined(PoolState).render(None).plain == ""


def test_json_names_workers_in_quarantine_at_the_end_of_a_phase(capsys) -> None:
    with JsonReporter().phase("calibrate", 2, lambda: SICK):
        pass
    with JsonReporter().phase("price", 2):
        pass
    ends = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["state"] == "finished"]
    assert ends[0]["quarantined"][0]["worker"] == "worker-1@h:7"
    assert "quarantined" not in ends[1]


def test_long_phases_are_told_in_minutes(rich, monkeypatch):
    times = iter([0.0, 600.0])
    monkeypatch.setattr("was_search.service.reports.progress.time.perf_counter", lambda: next(times))
    with rich.phase("calibrate"):
        pass
    assert "calibrate 10.0 min" in shown(rich)


def test_json_is_one_object_a_line(capsys):
    use(JsonReporter())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == [
        "phase", "phase", "trial", "trial", "trial", "phase", "note", "result", "text",
    ]  # fmt: skip
    started, finished = events[:2]
    assert (started["state"], started["total"], finished["state"]) == ("started", 2, "finished")
    assert finished["seconds"] >= 0
    assert events[2]["best_loss_nats"] is None
    assert events[3] == {
        "event": "trial",
        "study": "study [/x]",
        "protocol": PROTOCOL,
        "finished": 1,
        "total": 20,
        "stopped": 0,
        "tokens_saved": 0.0,
        "failed": 0,
        "workers": {"ready": 0, "loading": 0, "pending": 0, "draining": 0, "quarantined": 0},
        "fitness": "nll",
        "best_loss_nats": 1.25,
        "best_nll_nats": 1.25,
        "slot": 3,
        "loss_nats": 1.25,
        "nll_nats": 1.25,
    }
    assert (events[5]["state"], events[5]["detail"]) == ("cached", PROTOCOL)
    assert events[6]["text"] == "plan: /data/[/x]/plan :dog:"
    assert events[7] == {"event": "result", "a": 1}
    assert events[8]["text"] == "generated [search] :dog:"


def test_a_program_sees_only_the_text_asked_for(capsys):
    use(Reporter())
    assert capsys.readouterr().out == "generated [search] :dog:\n"


def test_quiet_shows_tables_and_texts_and_nothing_of_the_way(capsys):
    use(QuietReporter())
    found = capsys.readouterr().out
    assert found.endswith("generated [search] :dog:\n")
    assert found.lstrip().startswith("Title [t]")
    assert not any(words in found for words in ("calibrate", "price", "plan:", "trials", "✓"))


TEXT = ("\tif [x]:", "\r\n", " :dog: \x1b]0;own\x07 \x9b1m")
"""Parts of a text that somebody's model wrote: blanks, brackets, and commands to a terminal."""


@pytest.mark.parametrize("kind", [QuietReporter, RichReporter])
def test_a_file_is_written_a_text_as_it_is_and_at_once(kind):
    file = io.StringIO()
    with kind(Console(file=file, width=20)).writing("[prompt 1]") as write:
        write(TEXT[0])
        assert file.getvalue() == "[prompt 1]\n\tif [x]:"
        write("".join(TEXT[1:]))
    assert file.getvalue() == f"[prompt 1]\n{''.join(TEXT)}\n"


def test_a_terminal_is_not_commanded_by_a_text():
    file = io.StringIO()
    with RichReporter(Console(file=file, force_terminal=True)).writing() as write:
        for part in TEXT:
            write(part)
    assert file.getvalue() == "\tif [x]:\r\n :dog: \u241b]0;own\u2407 \ufffd1m\n"


def test_a_text_that_is_broken_off_ends_its_line(capsys):
    def broken_off() -> None:
        with RichReporter().writing() as write:
            write("def f")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert capsys.readouterr().out == "def f\n"


def test_programs_get_no_parts_of_a_text_and_users_of_the_library_do(capsys):
    for reporter in (JsonReporter(), Reporter()):
        with reporter.writing() as write:
            write("a\tb")
    assert capsys.readouterr().out == "a\tb\n"


def test_a_stopped_trials_mean_is_not_shown_as_a_loss(rich, capsys):
    """It is of the first sequences alone, and may be below the best's."""
    early = Slot(9, SlotState.STOPPED, loss_nats=0.5, nll_nats=0.5)
    state = State(finished=5, stopped=2, best=slot, current=early)
    assert _figures(state, 1.0, "nll").startswith("best 1.2500 nats (ppl 3.490, #3), current stopped early, ")
    with JsonReporter().search("s", PROTOCOL) as show:
        show(state)
    assert json.loads(capsys.readouterr().out)["stopped_early"] is True


class Beats:
    """A clock and a ticking that a test moves by hand: no test waits for half a minute."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.say: Callable[[], None] | None = None

    def now(self) -> float:
        return self.seconds

    @contextmanager
    def ticking(self, say: Callable[[], None]) -> Iterator[None]:
        self.say = say
        yield
        self.say = None

    def after(self, seconds: float) -> None:
        self.seconds += seconds
        assert self.say is not None
        self.say()


@pytest.fixture
def beats():
    return Beats()


def test_a_log_says_within_a_phase_how_far_it_is(beats):
    reporter = RichReporter(Console(file=io.StringIO(), width=160), now=beats.now, ticking=beats.ticking)
    pool = PoolState(quarantined=(Quarantined("w3", "12:00:00", "slow"),))
    with reporter.phase("greedy table on a [x]", 8, lambda: pool) as advance:
        beats.after(30.0)
        advance()
        advance()
        beats.after(30.0)
    with reporter.phase("start Ray"):
        beats.after(45.0)
    assert beats.say is None
    assert shown(reporter).splitlines() == [
        "  greedy table on a [x]: 0 of 8, 30.0 s, 1 worker(s) in quarantine",
        "  greedy table on a [x]: 2 of 8, 60.0 s, ETA 3.0 min, 1 worker(s) in quarantine",
        "✓ greedy table on a [x] 60.0 s, 1 worker(s) in quarantine",
        "  start Ray: 45.0 s",
        "✓ start Ray 45.0 s",
    ]


def test_a_log_says_within_a_search_what_is_best_and_when_it_ends(beats):
    reporter = RichReporter(Console(file=io.StringIO(), width=200), now=beats.now, ticking=beats.ticking)
    with reporter.search("s", PROTOCOL) as show:
        beats.after(30.0)
        show(replace(STATES[1], finished=12))  # eleven of them by an earlier run
        beats.after(30.0)
        show(replace(STATES[2], finished=15))
        beats.after(60.0)
    lines = shown(reporter).splitlines()[1:4]
    assert lines[0] == "  search: 30.0 s"
    assert lines[1].startswith("  search: 12 of 20 trials, best 1.2500 nats (ppl 3.490, #3), 0.0 trials/min, ")
    assert lines[1].endswith(", 60.0 s")
    assert lines[2].startswith("  search: 15 of 20 trials, best 1.2500 nats")
    assert lines[2].endswith(", 2.0 min, ETA 3.3 min")  # three in two minutes, five to go


def test_json_says_it_too(beats, capsys):
    reporter = JsonReporter(now=beats.now, ticking=beats.ticking)
    with reporter.phase("price", 4) as advance:
        advance()
        beats.after(30.0)
    running = json.loads(capsys.readouterr().out.splitlines()[1])
    expected = {"state": "running", "done": 1, "total": 4, "seconds": 30.0, "eta_seconds": 90.0}
    assert running == {"event": "phase", "name": "price", **expected}


def test_json_says_it_of_a_search_too(beats, capsys):
    """A trial of a large model takes minutes, in which no other line comes."""
    with JsonReporter(now=beats.now, ticking=beats.ticking).search("s", PROTOCOL) as show:
        beats.after(30.0)
        show(STATES[1])
        show(STATES[2])
        beats.after(30.0)
    first, last = (line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["event"] == "search")
    assert first == {"event": "search", "state": "running", "study": "s", "seconds": 30.0}
    expected = {"finished": 4, "total": 20, "eta_seconds": 320.0, "best_loss_nats": 1.25, "seconds": 60.0}
    assert last == {"event": "search", "state": "running", "study": "s", **expected}


def test_what_is_over_at_once_leaves_no_line_and_what_lasts_does(beats, capsys):
    rich = RichReporter(Console(file=io.StringIO(), width=160), now=beats.now, ticking=beats.ticking)
    for reporter in (rich, JsonReporter(now=beats.now, ticking=beats.ticking)):
        with reporter.phase("read it", least_seconds=2.0):
            beats.seconds += 1.9
        with reporter.phase("fetch it", least_seconds=2.0):
            beats.after(31.0)
    assert shown(rich).splitlines() == ["  fetch it: 31.0 s", "✓ fetch it 31.0 s"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["name"], line["state"]) for line in lines] == [("fetch it", "running"), ("fetch it", "finished")]


@pytest.mark.parametrize("kind", ["terminal", "quiet"])
def test_no_lines_where_a_bar_moves_or_silence_was_asked_for(beats, kind):
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    options = {"now": beats.now, "ticking": beats.ticking}
    reporter = RichReporter(console, **options) if kind == "terminal" else QuietReporter(console)
    with reporter.phase("x", 2):
        assert beats.say is None


def test_a_terminal_that_cannot_redraw_gets_lines(beats, monkeypatch):
    """An editor's shell is a terminal, and shows no bar."""
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    with RichReporter(console, now=beats.now, ticking=beats.ticking).phase("x", 2):
        beats.after(31.0)
    assert "x: 0 of 2, 31.0 s" in console.file.getvalue()


def test_the_real_ticking_ends_with_its_block_and_with_its_reader(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_SECONDS", 0.001)
    said = threading.Event()
    calls: list[int] = []

    def say() -> None:
        calls.append(1)
        said.set()
        raise BrokenPipeError  # nobody reads any more

    with heartbeat.every_half_minute(say):
        assert said.wait(60)
    assert len(calls) == 1
    assert not any(thread.name == "progress lines" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.0, "3.0 s"), (119.0, "119.0 s"), (120.0, "2.0 min"), (7200.0, "2.0 h")]
)
def test_durations(seconds, words):
    assert heartbeat.clock(seconds) == words
