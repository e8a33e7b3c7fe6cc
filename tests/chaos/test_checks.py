"""The checks of a chaos run find what they are there to find."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from tests.chaos import checks
from tests.chaos.cluster import STUDY, Exit
from tests.chaos.counted_worker import EvaluationLog, vector_name
from tests.chaos.faults import Hit
from was_search.studies.slots import Slot, SlotState


def slot(number: int, **changes: Any) -> Slot:
    complete = Slot(
        number,
        SlotState.COMPLETE,
        attempt=1,
        params={"x": number / 10},
        sparsities=np.full((1, 7), 0.1 * number),
        losses=np.array([1.0, 2.0]) + number,
        loss_nats=1.5 + number,
        trial_id=100 + number,
    )
    return dataclasses.replace(complete, **changes)


def trial(of: Slot, **changes: Any) -> optuna.trial.FrozenTrial:
    made = optuna.trial.create_trial(
        params=of.params,
        distributions={"x": optuna.distributions.FloatDistribution(0.0, 1.0)},
        value=of.loss_nats,
        user_attrs={"slot": of.number},
    )
    made._trial_id = of.trial_id
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def witness(slots: list[Slot]) -> checks.Witness:
    return checks.Witness({one.number: (str(one.state), "", one.loss_nats) for one in slots})


SLOTS = [slot(0), slot(1), slot(2)]


def test_slots_pass_when_each_is_finished() -> None:
    checks.check_slots(SLOTS, 3, witness(SLOTS))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (SLOTS[:2], "slots should be 0 to 2"),
        ([*SLOTS[:2], slot(2, state=SlotState.RUNNING)], "unfinished"),
        ([*SLOTS[:2], slot(2, state=SlotState.FAILED, error="lost 3 times")], "lost 3 times"),
    ],
)
def test_slots_that_are_missing_unfinished_or_failed_are_found(slots: list[Slot], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        checks.check_slots(slots, 3, witness(SLOTS))


def test_a_second_finish_is_found() -> None:
    class Postgres:
        loss = 1.5

        def query(self, statement: str, **values: Any) -> list[Any]:
            return [SimpleNamespace(number=0, state="complete", finished_at="noon", loss_nats=self.loss)]

    cluster: Any = SimpleNamespace(postgres=Postgres())
    seen = checks.Witness()
    seen.look(cluster)
    seen.look(cluster)
    cluster.postgres.loss = 1.25
    with pytest.raises(AssertionError, match="slot 0 finished twice"):
        seen.look(cluster)


def test_trials_pass_when_they_agree() -> None:
    checks.check_trials(SLOTS, [trial(one) for one in SLOTS])


@pytest.mark.parametrize(
    "trials",
    [
        [trial(one) for one in SLOTS[:2]],
        [*(trial(one) for one in SLOTS), trial(slot(2, trial_id=7))],
        [*(trial(one) for one in SLOTS[:2]), trial(SLOTS[2], state=optuna.trial.TrialState.RUNNING, value=None)],
        [*(trial(one) for one in SLOTS[:2]), trial(SLOTS[2], state=optuna.trial.TrialState.FAIL, value=None)],
        [*(trial(one) for one in SLOTS[:2]), trial(SLOTS[2], value=9.0)],
        [*(trial(one) for one in SLOTS[:2]), trial(slot(2, params={"x": 0.9}))],
        [*(trial(one) for one in SLOTS[:2]), trial(SLOTS[2], user_attrs={"slot": 1})],
    ],
    ids=["missing", "surplus", "running", "failed", "other value", "other parameters", "other slot"],
)
def test_trials_that_disagree_are_found(trials: list[optuna.trial.FrozenTrial]) -> None:
    with pytest.raises(AssertionError):
        checks.check_trials(SLOTS, trials)


def test_an_evaluation_that_was_ended_must_be_handed_out_again(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path)
    assert checks.check_lost([slot(0, attempt=2)], [Hit("kill worker", "", [(0, 1)])], log, 10.0) == 0
    with pytest.raises(AssertionError, match="slot 0 was not handed out again"):
        checks.check_lost([slot(0, attempt=1)], [Hit("kill worker", "", [(0, 1)])], log, 10.0)


@pytest.mark.parametrize(
    ("fault", "ended", "looks", "taken"),
    [
        ("delay a reply", 115.5, [101.0, 109.0, 115.6], True),
        ("delay a reply", 115.5, [101.0, 110.1, 115.6], False),
        ("delay a reply", 109.0, [101.0, 115.6], False),
        ("delay a reply", None, [101.0], False),
        ("kill worker", 115.5, [101.0, 109.0, 115.6], False),
    ],
    ids=["nobody looked in between", "somebody looked", "it was not late", "it did not end", "another fault"],
)
def test_a_late_reply_may_be_taken_only_where_the_coordinator_had_not_looked(
    tmp_path: Path, fault: str, ended: float | None, looks: list[float], taken: bool
) -> None:
    """It begins at 100 s, and its deadline is 10 s later."""
    one, two = slot(0), slot(1)
    cluster = write_log(
        tmp_path,
        ("begun", 1, one, 100.0),
        ("begun", 2, two, 108.0),
        *([("ended", 1, one, ended)] if ended else []),
        looks={1: looks, 2: [112.0]},
    )
    hits = [Hit(fault, "a delay", [(0, 1)])]
    cluster.log.read()
    if taken:
        assert checks.check_lost([one, two], hits, cluster.log, 10.0) == 1
        return
    with pytest.raises(AssertionError, match="slot 0 was not handed out again"):
        checks.check_lost([one, two], hits, cluster.log, 10.0)


def write_log(folder: Path, *entries: tuple[str, int, Slot, float], looks: dict[int, list[float]] | None = None) -> Any:
    lines: list[dict[str, Any]] = [
        {"event": event, "pid": pid, "vector": name(of), "study": STUDY, "slot": of.number, "attempt": pid, "at": at}
        for event, pid, of, at in entries
    ]
    lines += [{"event": "looked", "at": at, "workers": [pid]} for pid, times in (looks or {}).items() for at in times]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "evaluations.jsonl").write_text(text + '{"event": "beg')  # a line still being written
    return SimpleNamespace(log=EvaluationLog(folder))


def name(of: Slot) -> str:
    return vector_name(of.sparsities)


def test_evaluations_are_counted_against_hand_outs(tmp_path: Path) -> None:
    one = slot(0, attempt=2)
    cluster = write_log(tmp_path, ("begun", 1, one, 1.0), ("begun", 2, one, 2.0), ("ended", 2, one, 3.0))
    cluster.log.read()
    assert checks.check_evaluations(cluster, [one], []) == 2
    assert cluster.log.at_work(1) == name(one)
    assert cluster.log.at_work(2) is None
    with pytest.raises(AssertionError, match="beyond the hand-outs"):
        checks.check_evaluations(cluster, [slot(0, attempt=1)], [])


def test_a_result_that_nobody_evaluated_is_found(tmp_path: Path) -> None:
    cluster = write_log(tmp_path, ("begun", 1, slot(0), 1.0))
    cluster.log.read()
    with pytest.raises(AssertionError, match="without an evaluation"):
        checks.check_evaluations(cluster, [slot(0)], [])


def test_losses_are_compared_on_what_both_saw() -> None:
    short = slot(1, state=SlotState.STOPPED, losses=np.array([2.0]))
    assert checks.check_losses([slot(0), short], [slot(0), slot(1)]) == (2, 3)
    changed = slot(1, losses=np.array([np.nextafter(2.0, 3.0), 3.0]))
    with pytest.raises(AssertionError, match="slot 1"):
        checks.check_losses([slot(0), changed], [slot(0), slot(1)])
    with pytest.raises(AssertionError, match="1 of 2 vectors"):
        checks.check_losses([slot(0), slot(1)], [slot(0)])


def test_a_coordinator_may_end_only_for_a_reason_that_it_gives() -> None:
    assert checks.how_it_ended(Exit(1, -9, "killed")) == "killed"
    assert checks.how_it_ended(Exit(1, 0, "best: slot 3")) == "finished"
    assert checks.how_it_ended(Exit(1, 1, "error: another coordinator is\nrunning it (x)")) == "refused"
    with pytest.raises(AssertionError, match="traceback"):
        checks.how_it_ended(Exit(1, 1, "Traceback (most recent call last):"))
    with pytest.raises(AssertionError, match="every worker was lost"):
        checks.how_it_ended(Exit(1, 1, "error: every worker was lost"))
