"""The scaling benchmark: what counts as which phase, the summary of rows, and small jobs with one and two workers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.rows import append_row, read_rows
from benchmarks.harness.scaling_job import PHASES, InFlight, phase_seconds, run_job, told_seconds
from benchmarks.scaling import main
from tests.doubles.small_run import SMALL, small_model

ROOT = Path(__file__).resolve().parents[2]
CHEAP: dict[str, Any] = {
    **SMALL,
    "model": small_model(),
    "device": "cpu",
    "trials": 6,
    "search_sequences": 8,
    "test_sequences": 4,
    "slope_sequences": 8,
    "descent_epochs": 1,
    "descent_rounds": 1,
    "compensation": "on",
    "compensation_steps": 1,
    "compensation_tokens": 128,
}
FLAGS = [part for name, value in CHEAP.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def phase(name: str, seconds: float, state: str = "finished") -> dict[str, Any]:
    return {"event": "phase", "name": name, "state": state, "seconds": seconds}


def test_phases_are_told_by_their_names_and_by_the_search() -> None:
    events = [
        phase("start Ray", 1.0),
        phase("load the model on 2 worker(s)", 2.0),
        phase("calibrate on text", 4.0),
        phase("price (Fisher) on text", 7.0, "running"),
        phase("price (Fisher) on text", 8.0),
        phase("calibrate at the Fisher seed", 16.0),
        {"event": "trial"},
        phase("calibrate at best (slot 3)", 32.0),
        phase("learn a compensation on text", 64.0),
        phase("calibrate at best (slot 3), compensated", 128.0),
        phase("evaluate compensated", 256.0),
    ]
    assert phase_seconds(events) == {
        "start": 3.0,
        "calibrate": 4.0,
        "seed": 24.0,
        "compensate": 192.0,
        "export": 288.0,
    }
    told = told_seconds([*events, phase("start Ray", 0.5, "cached")])
    assert told["start Ray"] == 1.5
    assert told["price (Fisher) on text"] == 8.0
    assert len(told) == 9


def test_time_of_descents_side_by_side_counts_once() -> None:
    handler = InFlight()
    told = ((1, "handed out"), (2, "handed out"), (4, "ended"), (5, "put back"), (7, "handed out"), (8, "ended"))
    for second, what in told:
        record = logging.makeLogRecord({"msg": f"descent {what}", "created": float(second)})
        handler.emit(record)
    assert handler.seconds == 5.0


def row(workers: int, total: float, plan: str = "abc", gpus: float = 1.0) -> dict[str, Any]:
    return {
        "problem": "real",
        "job": "0123456789",
        "device": "H200",
        "workers": workers,
        "placement": {"gpus_per_worker": gpus},
        "settings": {"trials": 10},
        "seconds": {**dict.fromkeys(PHASES, 0.0), "trials": total / 2, "total": total},
        **{"trials_per_minute": 3.0, "busy_share": 0.5, "gpu_hours": 0.1, "stored_bytes": 10**6},
        **{"coordinator_cpu_seconds": 2.0, "plan_hash": plan, "descended_hash": "same", "origin": "sampler:tpe"},
    }


def test_the_summary_has_speed_ups_beside_the_ideal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    for each in (row(2, 60.0), row(1, 100.0), row(1, 90.0, gpus=2.0)):
        append_row(output, each)
    assert main(["--summary", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "| workers | 1 | 1 of 2 GPUs | 2 |" in said
    assert "| ideal | 1x | 2x | 2x |" in said
    assert "| total | 100.0 s | 1.11x | 1.67x |" in said
    assert "| seed |" not in said, "nothing to compare"
    assert "the plan is the same in all 3 runs" in said
    assert output.with_suffix(".html").exists()


def test_plans_that_differ_are_said_and_are_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    for each in (row(1, 100.0), row(2, 60.0, plan="xyz")):
        append_row(output, each)
    assert main(["--summary", "--output", str(output)]) == 1
    said = capsys.readouterr().out
    assert "the plans are not the same for all numbers of workers: 1: abc (sampler:tpe), 2: xyz (sampler:tpe)" in said


@pytest.mark.ray
@pytest.mark.postgres
@pytest.mark.slow(seconds=30)
def test_small_jobs_with_one_and_two_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    asked = [*FLAGS, "--workers", "1", "2", "--output", str(output)]
    status = main(asked, run_job)
    rows = read_rows(output)
    assert [each["workers"] for each in rows] == [1, 2]
    for each in rows:
        seconds = each["seconds"]
        assert set(seconds) == {*PHASES, "total"}
        assert all(seconds[name] > 0 for name in PHASES)
        assert sum(seconds[name] for name in PHASES) == pytest.approx(seconds["total"], abs=0.01)
        assert each["finished"] == CHEAP["trials"]
        assert 0.0 < each["busy_share"] <= 1.0
        assert each["gpu_hours"] == 0.0
        assert each["stored_bytes"] > 10**5
        assert each["coordinator_cpu_seconds"] > 0.0
        assert str(ROOT) not in json.dumps(each)
        assert small_model() not in json.dumps(each)
    assert len({each["descended_hash"] for each in rows}) == 1
    same = len({each["plan_hash"] for each in rows}) == 1
    assert status == (0 if same else 1)
    assert "2 run(s), 0 of them done" in capsys.readouterr().out

    def none(*_: object) -> dict[str, Any]:
        raise AssertionError("both rows are there")

    assert main(asked, none) == status
    said = capsys.readouterr().out
    assert "2 run(s), 2 of them done" in said
    assert "| ideal | 1x | 2x |" in said
    assert read_rows(output) == rows
