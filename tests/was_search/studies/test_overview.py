"""Figures of a study, from made-up rows whose answers can be counted by hand."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from was_search.service.reports.status import duration, status_line, status_rows
from was_search.studies.control import Control, Overrides, Spent, Wish
from was_search.studies.overview import RunRecord, SlotLine, Snapshot, failures_by_reason, overview, to_json
from was_search.studies.pool_state import PoolState, Quarantined
from was_search.studies.slots import SlotState

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def line(number: int, state: SlotState = SlotState.WAITING, **more: Any) -> SlotLine:
    values = {"origin": "", "loss_nats": None, "nll_nats": None, "sequences": 0, "seconds": 0.0}
    return SlotLine(number, state, **{**values, "started_at": None, "finished_at": None, **more})


def done(number: int, state: SlotState, start: float, end: float, loss: float | None, sequences: int) -> SlotLine:
    return line(
        number,
        state,
        origin="sampler:tpe",
        loss_nats=loss,
        nll_nats=loss,
        sequences=sequences,
        seconds=end - start,
        started_at=at(start),
        finished_at=at(end),
    )


RUN = RunRecord(
    epoch=3,
    coordinator="node:17",
    started_at=START,
    seen_at=at(100),
    ended_at=None,
    ending="",
    detail="",
    paused=False,
    workers=2,
    gpus_per_worker=0.5,
    seconds=100.0,
    worker_seconds=200.0,
    gpu_seconds=100.0,
)
SLOTS = [
    done(0, SlotState.COMPLETE, -60, -40, 3.0, 8),  # of an earlier run
    done(1, SlotState.COMPLETE, 0, 60, 2.0, 8),
    done(2, SlotState.STOPPED, 0, 20, 1.0, 2),
    dataclasses.replace(done(3, SlotState.FAILED, 20, 40, None, 0), error="lost 3 times on worker-1@h:5: gone\nmore"),
    line(4, SlotState.RUNNING, started_at=at(70)),
    *(line(n) for n in range(5, 14)),
]
SNAPSHOT = Snapshot(
    name="s",
    identity={"target": 0.6},
    config={"trials": 14, "max_failures": 5},
    report={},
    control=Control(n_slots=14),
    slots=SLOTS,
    runs=[RUN],
    alive=True,
    epoch=3,
    now=at(100),
)


def changed(run: dict[str, Any] | None = None, **more: Any) -> Snapshot:
    if run is not None:
        more["runs"] = [dataclasses.replace(RUN, **run)]
    return dataclasses.replace(SNAPSHOT, **more)


def test_a_running_study() -> None:
    found = overview(SNAPSHOT)
    assert (found.play, found.play_detail) == ("running", "by node:17 since 2026-01-01 12:00:00 UTC")
    assert (found.n_slots, found.finished) == (14, 4)
    assert found.best == SLOTS[1]
    assert found.best_perplexity == pytest.approx(np.exp(2.0))
    assert found.tokens_saved == pytest.approx(1 - 18 / 24)
    assert found.trials_per_minute == pytest.approx(3 / (100 / 60))
    assert found.eta_seconds == pytest.approx(10 / 3 * 100)
    assert found.busy_share == pytest.approx((60 + 20 + 20 + 30) / 200)
    assert found.gpu_hours == pytest.approx(100 / 3600)
    assert found.failures == {"lost 3 times on a worker: gone": 1}


def test_what_has_passed_since_the_coordinator_wrote_is_added() -> None:
    found = overview(changed(now=at(110)))
    assert found.trials_per_minute == pytest.approx(3 / (110 / 60))
    assert found.busy_share == pytest.approx((60 + 20 + 20 + 40) / 220)
    assert found.gpu_hours == pytest.approx(110 / 3600)


def test_a_limit_in_time_bounds_the_eta() -> None:
    found = overview(changed(control=Control(Wish.RUN, Overrides(max_seconds=130.0), 14)))
    assert found.eta_seconds == pytest.approx(30.0)
    assert (found.limits.max_seconds, found.limits.max_failures) == (130.0, 5)


def test_what_other_targets_have_spent_shortens_the_eta_and_is_shown() -> None:
    limited = Control(Wish.RUN, Overrides(), 14)
    snapshot = changed(config={"max_seconds": 170.0, "patience": 9}, control=limited, elsewhere=Spent(50.0, 0.0))
    found = overview(snapshot)
    assert found.eta_seconds == pytest.approx(20.0)
    assert dict(status_rows(snapshot, found))["limits"] == "max_seconds 170 (50 spent by other targets), patience 9"
    assert to_json(snapshot, found)["spent_by_other_targets"] == {"seconds": 50.0, "gpu_seconds": 0.0}
    own = changed(control=Control(Wish.RUN, Overrides(max_seconds=130.0), 14), elsewhere=Spent(50.0, 0.0))
    assert overview(own).eta_seconds == pytest.approx(30.0), "a limit that was set is the study's own"


@pytest.mark.parametrize(
    ("snapshot", "play", "detail"),
    [
        (changed(run={"paused": True}), "paused", "by node:17"),
        (changed(run={"detail": "descent 1 of 2"}), "running", "descent 1 of 2, by node:17"),
        (changed(control=Control(Wish.DRAIN)), "draining", "by node:17"),
        (changed(control=Control(Wish.CANCEL)), "cancelling", "by node:17"),
        (changed(epoch=4), "starting", "a coordinator has taken"),
        (changed(alive=False), "lost", "its coordinator node:17 went away, last seen 2026-01-01 12:01:40"),
        (changed(alive=False, runs=[]), "idle", "no coordinator"),
        (changed(alive=False, slots=SLOTS[:4]), "finished", ""),
        (changed(run={"ending": "drained", "ended_at": at(100)}, alive=False), "drained", "2026-01-01 12:01:40"),
        (
            changed(run={"ending": "failed", "ended_at": at(9), "detail": "no GPU"}, alive=False),
            "failed",
            "no GPU, 2026",
        ),
        (changed(run={"ending": "finished", "ended_at": at(9)}, alive=False), "idle", "has got more slots since"),
        (changed(alive=True, slots=[], runs=[], epoch=1), "starting", ""),
    ],
)
def test_the_state_of_play(snapshot: Snapshot, play: str, detail: str) -> None:
    found = overview(snapshot)
    assert found.play == play
    assert detail in found.play_detail
    if play not in ("running", "draining", "cancelling"):
        assert found.eta_seconds is None
    status_line(snapshot, found)
    assert status_rows(snapshot, found)[1][1].startswith(play)


def test_a_study_of_which_nothing_is_known() -> None:
    snapshot = dataclasses.replace(SNAPSHOT, alive=False, runs=[], slots=[line(0)], config={})
    found = overview(snapshot)
    assert (found.trials_per_minute, found.eta_seconds, found.busy_share, found.best) == (None,) * 4
    assert (found.gpu_hours, found.tokens_saved) == (0.0, 0.0)
    assert to_json(snapshot, found)["best_perplexity"] is None
    assert dict(status_rows(snapshot, found))["best"] == "no complete trial yet"


def test_rows_and_json() -> None:
    snapshot = changed(control=Control(Wish.RUN, Overrides(workers=3), 14))
    found = overview(snapshot)
    rows = dict(status_rows(snapshot, found, gpu_price=36.0))
    assert rows["trials"] == "4 of 14 finished: 9 waiting, 1 running, 2 complete, 1 stopped, 1 failed"
    assert rows["best"] == "2.0000 nats per token, perplexity 7.389 (slot 1, sampler:tpe)"
    assert rows["workers"] == "2 (3 asked for), evaluating 65 % of their time"
    assert rows["cost"] == "1.00 at 36 a GPU hour"
    assert rows["limits"] == "max_failures 5"
    assert rows["failed 1 x"] == "lost 3 times on a worker: gone"
    assert rows["ETA"] == "0:05:33"
    shown = to_json(snapshot, found, gpu_price=36.0)
    assert shown["cost"] == pytest.approx(1.0)
    assert (shown["state"], shown["coordinator"], shown["overrides"]) == ("running", "node:17", {"workers": 3})
    assert shown["counts"] == {"waiting": 9, "running": 1, "complete": 2, "stopped": 1, "failed": 1}
    assert "running, 4/14 trials, 1 running, 1 failed, best 2.0000 nats" in status_line(snapshot, found)


def test_reasons_of_failures_are_counted_without_the_workers_names() -> None:
    words = [f"ConnectionError on worker-{n}@node{n}:{n}: died\ntrace {n}" for n in range(3)] + ["the loss is nan", ""]
    slots = [line(n, SlotState.FAILED, error=error) for n, error in enumerate(words)]
    assert failures_by_reason(slots) == {
        "ConnectionError on a worker: died": 3,
        "the loss is nan": 1,
        "no reason given": 1,
    }


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 90061)] == ["0:00:00", "0:01:01", "1 day, 1:01:01"]


def test_a_range_of_workers_and_those_in_quarantine_are_shown() -> None:
    held = Quarantined("worker-3@gpu-4:7", "slow, 8.0 times its peers' seconds a token", "2026-01-01T10:00:00+00:00")
    pool = PoolState("2:64", ready=2, pending=61, draining=1, quarantined=(held,))
    snapshot = changed(runs=[dataclasses.replace(RUN, pool=pool.to_json())], epoch=RUN.epoch)
    found = overview(snapshot)
    rows = dict(status_rows(snapshot, found))
    assert rows["workers"].startswith("2 (2:64 asked for, 61 pending, 1 draining, 1 quarantined), evaluating")
    assert rows["quarantined"] == f"{held.worker} since {held.since}: {held.reason}"
    shown = json.loads(json.dumps(to_json(snapshot, found)))
    assert shown["pool"]["asked"] == "2:64"
    assert shown["pool"]["quarantined"][0]["worker"] == "worker-3@gpu-4:7"
