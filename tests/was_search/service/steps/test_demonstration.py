"""What the demo shows, with fewer trials and half the texts: the order of the seeds on the test text."""

from __future__ import annotations

from pathlib import Path

import pytest

from was_search.masks.intervals import paired_interval
from was_search.service.context import Context
from was_search.service.steps.demonstration import demo, demo_settings

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.slow(seconds=300)]


def test_fisher_beats_greedy_beats_uniform_on_the_test_text(postgres_url: str, tmp_path: Path, capsys) -> None:
    texts = {"calibration_sequences": 48, "search_sequences": 32, "test_sequences": 96}
    settings = demo_settings(storage=postgres_url, trials=5, plan=str(tmp_path / "plan"), **texts)
    with Context(settings) as context:
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
