"""Calls that are lost or fail, in the loop without Ray or Postgres: which slot fails, and what ends the search."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.harness.pool_double import PoolDouble
from tests.doubles.loop_doubles import evaluation, evaluations, one_worker
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.durable import durable
from was_search.errors import ModelError, TransientError
from was_search.studies.slots import SlotState


def test_a_lost_call_is_repeated_with_the_same_vector(run) -> None:
    seen: dict[int, np.ndarray] = {}

    def answer(call, s, _):
        seen[call] = s
        if call == 4:
            raise ConnectionError("the worker died")
        return evaluation(s)

    store = MemorySlots(8)
    slots = run(store, answer)
    assert all(s.state is SlotState.COMPLETE for s in slots)
    again = [s for s in slots if s.attempt == 2]
    assert len(again) == 1
    np.testing.assert_array_equal(seen[4], again[0].sparsities)
    assert len(seen) == 9


@pytest.mark.parametrize("error", [ConnectionError("died"), TransientError("GPU out of memory")])
def test_a_vector_that_always_loses_its_worker_fails_after_the_cap(run, error) -> None:
    bad: list[np.ndarray] = []

    def answer(call, s, _):
        if call == 3 or any(np.array_equal(s, b) for b in bad):
            bad.append(s)
            raise error
        return evaluation(s)

    slots = run(MemorySlots(6), answer, max_attempts=3, pool=one_worker)
    failed = [s for s in slots if s.state is SlotState.FAILED]
    assert len(bad) == 3
    assert len(failed) == 1
    assert failed[0].error.startswith("lost 3 times; last:")


def test_an_error_that_repeating_cannot_mend_stops_and_consumes_nothing(run) -> None:
    def answer(call, s, _):
        if call == 4:
            raise ModelError("the checkpoint is gone")
        return evaluation(s)

    store = MemorySlots(8)
    with pytest.raises(ModelError, match="the checkpoint is gone"):
        run(store, answer)
    assert {s.state for s in store.slots()} == {SlotState.COMPLETE, SlotState.WAITING}
    slots = run(store, lambda _, s, __: evaluation(s))
    assert all(s.state is SlotState.COMPLETE for s in slots)
    assert sorted(store.finishes) == list(range(8))


def test_while_nothing_has_succeeded_no_slot_pays_for_lost_calls(run) -> None:
    def answer(call, s, _):
        raise TransientError("GPU out of memory; use a smaller --batch-size")

    store = MemorySlots(8)
    with pytest.raises(TransientError, match=r"fail again and again.*smaller --batch-size"):
        run(store, answer)
    assert {s.state for s in store.slots()} == {SlotState.WAITING}
    assert all(s.state is SlotState.COMPLETE for s in run(store, lambda _, s, __: evaluation(s)))


def test_hand_outs_of_earlier_runs_are_no_losses(run) -> None:
    store = MemorySlots(6)
    with pytest.raises(ModelError):
        run(store, lambda call, s, _: (_ for _ in ()).throw(ModelError("stop")) if call == 4 else evaluation(s))
    store.rows = [dataclasses.replace(s, attempt=7) if s.state is SlotState.WAITING else s for s in store.rows]
    lost = []

    def lose_once(call, s, _):
        if not lost:
            lost.append(call)
            raise ConnectionError("died")
        return evaluation(s)

    assert all(s.state is SlotState.COMPLETE for s in run(store, lose_once, max_attempts=3))


def test_durable_repeats_transient_errors_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    calls: list[str] = []

    class Flaky(MemorySlots):
        def requeue(self, number: int, reason: str) -> None:
            calls.append(reason)
            if len(calls) < 4:
                raise TransientError("the database restarts")
            if reason == "bad":
                raise ModelError("no")

    store = durable(Flaky(1))
    store.requeue(0, "x")
    assert calls == ["x"] * 4
    with pytest.raises(ModelError):
        store.requeue(0, "bad")
    assert calls == ["x"] * 4 + ["bad"]


def test_time_in_which_the_database_was_waited_for_counts_against_no_call(run) -> None:
    """Meanwhile its reply has come: its worker is none that hangs, and it is no evaluation to throw away."""
    now = 0.0
    pools: list[PoolDouble] = []

    class Restarting(MemorySlots):
        def finish_all(self, results):
            nonlocal now
            now += 900.0
            return super().finish_all(results)

    def two_workers(answer) -> PoolDouble:
        pools.append(PoolDouble(evaluations(answer), clock=lambda: now))
        return pools[-1]

    slots = run(Restarting(8), lambda call, s, _: evaluation(s), pool=two_workers, trial_timeout=0.0)
    assert now == 8 * 900.0, "one after the other, with another call in flight"
    assert [slot.attempt for slot in slots] == [1] * 8
    assert (pools[0].put, pools[0].given_up) == ([], [])
