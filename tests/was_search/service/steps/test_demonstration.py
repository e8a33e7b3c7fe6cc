"""What the demo shows, with fewer trials, shorter descents and less text: the order of seeds on the test text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doubles.tiny_models import tiny_plan
from tests.doubles.workers_here import workers_here
from was_kernels.timing import generate
from was_kernels.timing.generate import TokenTimes
from was_search.masks.intervals import paired_interval
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.steps.demonstration import decoding_speed, demo, demo_settings
from was_search.service.steps.evaluation import load_for


class Notes(Reporter):
    """What is said beside the texts."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_it_says_how_fast_this_machine_decodes(monkeypatch) -> None:
    monkeypatch.setattr(
        generate,
        "beside_each_other",
        lambda *_, **__: [TokenTimes(0.001, 0.008), TokenTimes(0.001, 0.0064), TokenTimes(0.001, 0.005)],
    )
    with Context(demo_settings()) as context:
        model, _ = load_for(context, None)
        plan = replace(tiny_plan(model), fingerprint=context.model.fingerprint)
        said = decoding_speed(context, plan, "def")
    speeds = r"dense 125 tokens/s, with the plan 200 tokens/s \(1\.60x; with every channel kept 1\.25x\)"
    assert re.fullmatch(rf"On \d+ thread\(s\) here: {speeds}, by turns through generate", said)


@pytest.mark.postgres
@pytest.mark.slow(seconds=90)
def test_fisher_beats_greedy_beats_uniform_on_the_test_text(postgres_url: str, tmp_path: Path, capsys) -> None:
    texts = {"calibration_sequences": 48, "greedy_sequences": 1, "search_sequences": 32, "test_sequences": 48}
    short = {"descent_rounds": 2, "descent_sequences": 8, "compensation_steps": 1}
    settings = demo_settings(storage=postgres_url, trials=5, plan=str(tmp_path / "plan"), **texts, **short)
    notes = Notes()
    with workers_here(), Context(settings, notes) as context:
        result = demo(context, max_new_tokens=8)
    rows = {row.name.split(" (")[0]: row for row in result.rows}
    losses = {name: row.test.evaluation.losses for name, row in rows.items()}
    for better, worse in (("greedy-uniform", "uniform"), ("fisher seed", "greedy-uniform")):
        gap = paired_interval(losses[better], losses[worse])
        assert gap.high < 0.0, f"{better} - {worse}: {gap}"
    best, seed = rows["best"], rows["fisher seed"]
    assert best.search.evaluation.loss_nats <= seed.search.evaluation.loss_nats
    assert paired_interval(losses["best"], losses["fisher seed"]).low <= 0.0
    for name in ("uniform", "greedy-uniform", "fisher seed", "best"):
        assert rows[name].calibration_achieved == pytest.approx(0.6, abs=0.005)
        assert rows[name].test.achieved == pytest.approx(0.6, abs=0.01)
    assert "def read_lines(path):" in capsys.readouterr().out
    speeds = r"here: dense \d+ tokens/s, with the plan \d+ tokens/s \(\d+\.\d\dx; with every channel kept \d+\.\d\dx\)"
    assert sum(bool(re.search(speeds, note)) for note in notes.said) == 1
