"""The dashboard in a real browser: headless Chromium, where there is one."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.small_study import finish, hand_out, new_study
from tests.storage.dashboard.test_plan_files import plan_in
from was_search.service.reports.plots import levels_figure, progress_figure, savings_figure, timeline_figure
from was_search.studies.slots import SlotState
from was_storage.dashboard.app import open_dashboard
from was_storage.dashboard.plan_files import attach_plan
from was_storage.dashboard.study_page import annotate
from was_storage.server.database import Database
from was_storage.studies.store import StudyRecord, StudyStore

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUILD = Path(__file__).parents[3] / "build"

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def record(database: Database, tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """A study with a stopped and a failed slot whose losses so far are lower than the best's; two workers."""
    found = new_study(database, 6, name="browser study")
    with StudyStore(database).coordinate(found.name) as session:
        for number, (state, loss) in enumerate(
            [
                (SlotState.COMPLETE, 2.5),
                (SlotState.COMPLETE, 2.25),
                (SlotState.STOPPED, 1.5),
                (SlotState.FAILED, None),
                (SlotState.COMPLETE, 2.75),
            ]
        ):
            worker = f"worker-{number % 2}@node:{100 + number % 2}"
            attempt = hand_out(session, number, worker)
            time.sleep(0.2)
            losses = None if loss is None else np.full(8 if state is SlotState.COMPLETE else 3, loss)
            finish(session, number, attempt, state, losses=losses, tokens=100, seconds=1.5, worker=worker)
        slots = session.slots()
    levels = np.array([0.5, 0.7])
    annotate(
        database,
        found.name,
        note="# The study's note\n\nBest: slot 1, perplexity 9.49.",
        figures={
            "progress": progress_figure(slots, "nll"),
            "levels": levels_figure(levels, {"uniform": levels}, 0.6),
            "timeline": timeline_figure(slots),
            "tokens-saved": savings_figure(slots),
        },
    )
    attach_plan(database, found.name, plan_in(tmp_path_factory.mktemp("plans") / "plan"))
    return found


@pytest.fixture(scope="module")
def address(database: Database, record: StudyRecord) -> Iterator[str]:
    with database.read_only() as reading, open_dashboard(reading, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"{server.url}/studies/{record.optuna_study_id}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def browse(address: str, tmp_path: Path) -> Callable[[str, str], str]:
    """The words of one of the study's pages, once those expected are there; a screenshot goes to ``build/``."""

    def load(page: str, expected: str) -> str:
        BUILD.mkdir(exist_ok=True)
        common = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", f"--user-data-dir={tmp_path}", "--window-size=1400,3200",
            "--virtual-time-budget=15000",
        ]  # fmt: skip
        shot = BUILD / f"dashboard-{page or 'history'}.png"
        shot.unlink(missing_ok=True)
        url = f"{address}/{page}".rstrip("/")
        subprocess.run([*common, f"--screenshot={shot}", url], check=True, capture_output=True, timeout=180)
        assert shot.stat().st_size > 10_000
        words = ""
        for _ in range(5):  # on a busy machine the page may be dumped before its answers have come
            found = subprocess.run(
                [*common, "--dump-dom", url], check=True, capture_output=True, timeout=180, text=True
            ).stdout
            text = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", found))
            words = " ".join(html.unescape(text).split())
            if expected in words:
                break
        assert expected in words, words[:2000]
        return words

    return load


def test_the_history_shows_the_study_and_its_best_trial(browse, record) -> None:
    words = browse("", "Best Trial")
    assert record.name in words
    # A stopped trial's lower running mean is no result, and the failed one has none.
    best = re.search(r"Best Trial.{0,400}", words)
    assert best is not None
    assert re.search(r"2\.25\b", best.group()), best.group()
    assert "1.5" not in re.findall(r"\d+\.\d+", best.group())[:1]


def test_the_note_and_our_plots_are_there(browse) -> None:
    assert "perplexity 9.49" in browse("note", "The study's note")
    words = browse("", "Levels at a budget of 60 %")
    assert "Perplexity on the search split" in words
    assert "Workers and the slots that they evaluated" in words
    assert all(f"worker-{n}@node:{100 + n}" in words for n in (0, 1))
    assert "16 % of the tokens saved" in words  # 27 of 32 sequences were read


def test_the_plan_is_there_to_download(browse) -> None:
    assert "Study Artifacts" in browse("", "browser study-plan.zip")


def test_every_trial_is_listed_with_its_state(browse) -> None:
    words = browse("trials", "Pruned")
    assert "Complete" in words
    assert "Fail" in words


def test_a_studys_name_and_note_are_text_and_no_markup(database: Database, tmp_path: Path) -> None:
    """What would run changes the page's title."""
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    found = new_study(database, 1, name=attack)
    note = f"# {attack}\n\n{attack}\n\n[link](javascript:document.title='owned')\n"
    levels = np.array([0.5, 0.7])
    annotate(database, found.name, note=note, figures={"levels": levels_figure(levels, {attack: levels}, 1)})
    with database.read_only() as reading, open_dashboard(reading, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for page in ("/note", ""):
                command = [
                    str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                    f"--user-data-dir={tmp_path}", "--virtual-time-budget=15000", "--dump-dom",
                    f"{server.url}/studies/{found.optuna_study_id}{page}",
                ]  # fmt: skip
                shown = subprocess.run(command, check=True, capture_output=True, timeout=180, text=True).stdout
                assert "onerror" in html.unescape(shown)  # the words are there
                assert "<title>owned" not in shown
                assert not re.search(r"<img[^>]*onerror|href=\"javascript", shown)
        finally:
            server.shutdown()
            thread.join()
