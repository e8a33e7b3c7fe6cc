"""The commands that look at a study and steer it: what they print, and what they refuse."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable

import pytest

from tests.doubles.small_study import finish, hand_out, new_study, propose
from was_search.service.cli import main
from was_search.service.settings import Settings
from was_search.studies.control import Wish
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.control import ControlStore
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


@pytest.fixture
def name(database: Database) -> str:
    """A study of six slots, one of them complete."""
    name = new_study(database, 6, f"cli-{uuid.uuid4().hex[:6]}").name
    with StudyStore(database).coordinate(name) as session:
        finish(session, 0, hand_out(session, 0), SlotState.COMPLETE, losses=[2.0, 2.2], nll_nats=2.1)
    return name


@pytest.fixture
def typed(database: Database, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Exit status, standard output and standard error of a command line."""
    monkeypatch.setenv("WAS_SEARCH_STORAGE", database.url)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["was-search", *words])
        try:
            main.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("command", "wish", "words"),
    [
        ("pause", Wish.PAUSE, "its next run will hand nothing out before 'was-search resume'"),
        ("resume", Wish.RUN, "its next run hands out as usual"),
        ("drain", Wish.DRAIN, "there is nothing to drain"),
        ("cancel", Wish.CANCEL, "there is nothing to cancel"),
    ],
)
def test_each_wish_is_written_down(typed, database: Database, name: str, command, wish, words) -> None:
    code, out, _ = typed(command, name)
    assert code == 0
    assert words in out
    assert ControlStore(database).read(name).wish is wish
    with StudyStore(database).coordinate(name):
        _, out, _ = typed(command, name)
        assert "its coordinator" in out
        assert json.loads(typed(command, name, "--json")[1].splitlines()[-1])["running"] is True


def test_set_changes_what_it_names(typed, database: Database, name: str) -> None:
    code, out, _ = typed("set", name, "--trials", "9", "--workers", "3", "--max-seconds", "60", "--patience", "0")
    assert code == 0
    assert (
        f"study {name}: trials 9, workers 3, max_seconds 60, patience 0; it holds from the study's next run on" in out
    )
    event = json.loads(typed("set", name, "--json", "--max-failures", "2")[1].splitlines()[-1])
    assert event["n_slots"] == 9
    assert event["overrides"] == {"trials": 9, "workers": 3, "max_seconds": 60.0, "max_failures": 2, "patience": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "set: nothing to change; give --trials"),
        (("--trials", "0"), "trials: must be at least 1, got 0"),
        (("--workers", "-1"), "workers: must be at least 1, got -1"),
        (("--max-seconds", "-5"), "max_seconds: must be a number and not negative"),
        (("--max-gpu-seconds", "nan"), "max_gpu_seconds: must be a number and not negative"),
        (("--max-failures", "-1"), "max_failures: must be a number and not negative"),
        (("--patience", "-1"), "patience: must be a number and not negative"),
    ],
)
def test_numbers_that_cannot_be_set(typed, database: Database, name: str, words, message) -> None:
    before = ControlStore(database).read(name)
    code, _, err = typed("set", name, *words)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert ControlStore(database).read(name) == before


def test_fewer_trials_than_have_finished(typed, database: Database, name: str) -> None:
    with StudyStore(database).coordinate(name) as session:
        propose(session, 1)
    code, _, err = typed("set", name, "--trials", "1")
    assert code == 1
    assert "at least 2, got 1: the study has used 2 slots already, 1 of them finished, and keeps them" in err


@pytest.mark.parametrize("command", ["pause", "resume", "drain", "cancel", "set", "status"])
def test_unknown_studies(typed, command: str) -> None:
    more = ("--workers", "2") if command == "set" else ()
    code, _, err = typed(command, "nope", *more)
    assert code == 1
    assert "study 'nope' does not exist; this database has" in err.replace("\n", " ")


def test_status_shows_the_study_by_name_option_or_age(typed, name: str) -> None:
    for words in ((name,), ("--study", name), ()):
        code, out, _ = typed("status", *words, "--gpu-price", "2.5")
        assert code == 0
        assert name in out
        assert "1 of 6 finished: 5 waiting, 0 running, 1 complete" in out
        assert "2.1000 nats per token, perplexity 8.166 (slot 0, sampler:tpe)" in out
        assert "0.00 at 2.5 a GPU hour" in out
    assert "given twice" in typed("status", name, "--study", "other")[2]
    assert "gpu_price: must be a number and not negative" in typed("status", name, "--gpu-price", "-1")[2]
    event = json.loads(typed("status", name, "--json")[1].splitlines()[-1])
    assert (event["state"], event["best_slot"], event["n_slots"], event["cost"]) == ("idle", 0, 6, None)


def test_watch_shows_it_until_ctrl_c_and_through_a_restart(typed, name: str, monkeypatch) -> None:
    from was_search.errors import TransientError
    from was_storage.studies import overview as storage

    reads, read = [], storage.read_snapshot

    def restarting(database: Database, study: str):
        reads.append(study)
        if len(reads) == 2:
            raise TransientError("the database restarts")
        return read(database, study)

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        if len(reads) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "read_snapshot", restarting)
    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = typed("status", name, "--watch", "--every", "0.5")
    assert code == 0
    shown = out.splitlines()
    assert shown[1] == f"{name}: the database restarts"
    assert [f"{name}: idle, 1/6 trials" in line for line in shown] == [True, False, True, True]
    reads.clear()
    events = [json.loads(line) for line in typed("status", name, "--watch", "--every", "0.5", "--json")[1].splitlines()]
    assert [event["finished"] for event in events] == [1, 1, 1]
    assert "every: must be from 0.1" in typed("status", name, "--watch", "--every", "0")[2]


def test_the_redrawn_table(name: str, database: Database, monkeypatch) -> None:
    import io

    from rich.console import Console

    from was_search.service.context import Context
    from was_search.service.reports.progress import RichReporter
    from was_search.service.watching.study_status import watch

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    url = database.url
    with Context(Settings(storage=url), RichReporter(console)) as context:
        watch(context, name)
    assert "1 of 6 finished" in console.file.getvalue()
