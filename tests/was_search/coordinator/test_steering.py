"""The loop under wishes and limits, without Ray or Postgres: wishes, slots and a pool in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.harness.pool_double import PoolDouble
from tests.doubles.loop_doubles import SHAPE, evaluation, evaluations, many_workers, search_options, seeds, two_workers
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.steering import Steering
from was_search.errors import TransientError
from was_search.studies.control import NO_LIMITS, Control, EndingKind, Limits, Overrides, Spent, Usage, Wish
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import Slot, SlotState

NOTHING = Spent()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class MemoryControl:
    """Wishes in memory; ``beats`` are what was written down."""

    def __init__(self, before: Spent = NOTHING, **overrides: Any) -> None:
        self.before = before
        self.wish = Wish.RUN
        self.overrides = Overrides(**overrides)
        self.store: MemorySlots | None = None
        self.reads = 0
        self.beats: list[Usage] = []

    def spent_before(self) -> Spent:
        return self.before

    def read(self) -> Control:
        self.reads += 1
        return Control(self.wish, self.overrides, len(self.store.rows) if self.store else 0)

    def beat(self, usage: Usage) -> None:
        self.beats.append(usage)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_steering(clock: Clock) -> Callable[..., Steering]:
    def make(control: MemoryControl | None, limits: Limits = NO_LIMITS, **more: Any) -> Steering:
        options = {"pool": PoolDouble(gpus_per_worker=0.5), "drain": threading.Event(), "slots": (), **more}
        return Steering(control, limits=limits, clock=clock, **options)

    return make


def test_the_database_is_asked_once_a_second(new_steering, clock: Clock) -> None:
    control = MemoryControl()
    steering = new_steering(control)
    for _ in range(40):
        steering.steer()
        clock.now += 0.25
    assert control.reads == 10
    assert len(control.beats) == 2  # every five seconds


def test_time_is_counted_with_pauses_left_out_and_gpus_with_them(new_steering, clock: Clock) -> None:
    control = MemoryControl()
    steering = new_steering(control)
    steering.steer()
    clock.now += 4.0
    control.wish = Wish.PAUSE
    steering.steer()
    assert steering.paused
    assert not steering.open
    clock.now += 10.0
    steering.steer()
    steering.beat()
    assert control.beats[-1] == Usage(
        Spent(4.0, 14.0), worker_seconds=28.0, workers=2, paused=True, pool=PoolState("2", ready=2)
    )
    control.wish = Wish.RUN
    clock.now += 1.0
    steering.steer()
    assert steering.open
    assert control.beats[-1].paused is False, "that it goes on is written down at once"


def test_limits_count_earlier_runs_and_can_be_changed(new_steering, clock: Clock) -> None:
    control = MemoryControl(Spent(90.0, 1000.0))
    steering = new_steering(control, Limits(max_seconds=100.0))
    clock.now += 5.0
    control.overrides = Overrides(max_seconds=200.0)
    steering.steer()
    clock.now += 20.0
    steering.steer()
    assert steering.ending is None
    control.overrides = Overrides(max_seconds=200.0, max_gpu_seconds=1025.0)
    clock.now += 1.0
    steering.steer()
    assert steering.ending.kind is EndingKind.STOPPED
    assert steering.ending.detail == "max_gpu_seconds: 1026 GPU seconds, the limit is 1025"


def test_what_other_studies_of_the_command_have_spent_counts(new_steering, clock: Clock) -> None:
    control = MemoryControl(Spent(20.0, 0.0))
    steering = new_steering(control, Limits(max_seconds=100.0), elsewhere=Spent(75.0, 0.0))
    clock.now += 4.0
    steering.steer()
    assert steering.ending is None
    clock.now += 1.0
    steering.steer()
    assert steering.ending.detail == "max_seconds: 100 s of searching for all targets, the limit is 100 s"


def test_a_limit_that_was_set_for_the_study_is_its_own(new_steering, clock: Clock) -> None:
    control = MemoryControl(Spent(20.0, 0.0), max_seconds=30.0)
    steering = new_steering(control, Limits(max_seconds=100.0), elsewhere=Spent(175.0, 0.0))
    clock.now += 9.0
    steering.steer()
    assert steering.ending is None
    clock.now += 1.0
    steering.steer()
    assert steering.ending.detail == "max_seconds: 30 s of searching, the limit is 30 s"


def test_a_cancel_goes_before_a_drain_and_a_drain_before_a_rule(new_steering, clock: Clock) -> None:
    control = MemoryControl()
    steering = new_steering(control, Limits(max_seconds=1.0))
    kinds = []
    for wish in (Wish.RUN, Wish.DRAIN, Wish.RUN, Wish.CANCEL, Wish.DRAIN):
        clock.now += 2.0
        control.wish = wish
        steering.steer()
        kinds.append(steering.ending.kind)
    assert kinds == ["stopped", "drained", "drained", "cancelled", "cancelled"]


def test_the_pool_is_resized_once_for_each_number_asked(new_steering, clock: Clock, caplog) -> None:
    control, workers = MemoryControl(), PoolDouble(gpus_per_worker=0.5, most=8)
    steering = new_steering(control, pool=workers)
    for asked in (None, 3, 3, 99, 99, "2:6", 1, None):
        control.overrides = Overrides(workers=asked)
        steering.steer()
        clock.now += 1.0
    assert workers.sizes == ["3", "2:6", "1"]
    assert caplog.text.count("the number of workers stays 3: there is room for 8 workers") == 1


def test_a_worker_that_was_given_up_is_not_asked_for_again(new_steering, clock: Clock) -> None:
    control, workers = MemoryControl(workers=3), PoolDouble(gpus_per_worker=0.5)
    steering = new_steering(control, pool=workers)
    steering.steer()
    workers.lose_for_good()
    clock.now += 5.0
    steering.steer()
    assert workers.sizes == ["3"]
    assert control.beats[-1].workers == 2


def test_a_restart_of_the_database_is_waited_for(new_steering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    class Restarting(MemoryControl):
        def read(self) -> Control:
            control = super().read()
            if self.reads < 4:
                raise TransientError("the database restarts")
            return control

    control = Restarting()
    control.wish = Wish.DRAIN
    steering = new_steering(control)
    steering.steer()
    assert control.reads == 4
    assert steering.ending.kind is EndingKind.DRAINED


def test_without_a_control_ctrl_c_and_limits_hold(new_steering, clock: Clock) -> None:
    drain = threading.Event()
    steering = new_steering(None, Limits(max_failures=1), drain=drain, slots=[Slot(0, SlotState.WAITING)])
    steering.steer()
    assert steering.ending is None
    steering.finished(Slot(0, SlotState.FAILED))
    steering.steer()
    assert steering.ending.kind is EndingKind.STOPPED
    drain.set()
    steering.steer()
    assert steering.ending.kind is EndingKind.DRAINED


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, clock: Clock):
    """``loop(store, control, each)``: a loop whose clock advances a second a turn; ``each(turn)`` is called in it."""

    def make(
        store: MemorySlots,
        control: MemoryControl,
        each: Callable[[int], object] = lambda turn: None,
        pool_of=two_workers,
        **limits: Any,
    ) -> SearchLoop:
        options = search_options(sampler="random", limits=Limits(**limits))
        control.store = store
        pool = pool_of(lambda call, sparsities, rule: evaluation(sparsities))
        turns = iter(range(10_000))
        wait = pool.wait

        def turn(timeout_seconds: float):
            clock.now += 1.0
            each(next(turns))
            return wait(timeout_seconds)

        monkeypatch.setattr(pool, "wait", turn)
        return SearchLoop(
            store,
            pool,
            "tokens",
            "histograms",
            shape=SHAPE,
            seeds=seeds(),
            options=options,
            drain=threading.Event(),
            run_control=control,
            clock=clock,
        )

    return make


def finished(store: MemorySlots) -> int:
    return sum(slot.state.finished for slot in store.rows)


def test_a_paused_loop_ends_what_is_in_flight_and_stays(loop) -> None:
    store, control = MemorySlots(12), MemoryControl()
    seen: list[tuple[int, int]] = []

    def each(turn: int) -> None:
        if turn == 4:
            control.wish = Wish.PAUSE
        if 8 <= turn < 20:
            seen.append((finished(store), sum(slot.state is SlotState.RUNNING for slot in store.rows)))
        if turn == 20:
            control.wish = Wish.RUN

    run = loop(store, control, each)
    slots = run.run()
    assert len(set(seen)) == 1
    assert seen[0][1] == 0
    assert 4 <= seen[0][0] < 12
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert run.ending.kind is EndingKind.FINISHED
    assert all(slot.attempt == 1 for slot in slots)


def test_drain_ends_with_what_is_in_flight(loop) -> None:
    store, control = MemorySlots(20), MemoryControl()
    run = loop(store, control, lambda turn: setattr(control, "wish", Wish.DRAIN) if turn == 6 else None)
    slots = run.run()
    assert run.ending.kind is EndingKind.DRAINED
    assert {slot.state for slot in slots} == {SlotState.COMPLETE, SlotState.WAITING}
    assert 6 <= finished(store) < 12


def test_cancel_puts_back_what_is_in_flight(loop) -> None:
    store, control = MemorySlots(20), MemoryControl()
    run = loop(store, control, lambda turn: setattr(control, "wish", Wish.CANCEL) if turn == 6 else None)
    run.run()
    assert run.ending.kind is EndingKind.CANCELLED
    assert run._pool.abandoned == 1
    assert {slot.state for slot in store.rows} == {SlotState.COMPLETE, SlotState.WAITING}
    back = [slot for slot in store.rows if slot.error == "cancelled"]
    assert back
    assert all(slot.sparsities is not None and slot.attempt == 1 for slot in back)
    control.wish = Wish.RUN
    again = loop(store, control).run()
    assert all(slot.state is SlotState.COMPLETE for slot in again)
    assert sorted(store.finishes) == list(range(20))


def test_slots_are_added_and_dropped_while_it_runs(loop) -> None:
    store, control = MemorySlots(8), MemoryControl()

    def each(turn: int) -> None:
        if turn == 3:
            store.rows.extend(Slot(n, SlotState.WAITING) for n in range(8, 30))
        if turn == 12:
            control.overrides = Overrides(trials=20)
        if turn == 25:
            control.overrides = Overrides(trials=2)  # long gone

    slots = loop(store, control, each).run()
    assert [slot.number for slot in slots] == list(range(20))
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert store.shrunk == [20]


def test_fewer_trials_than_were_begun_end_with_those(loop) -> None:
    store, control = MemorySlots(30), MemoryControl()
    run = loop(store, control, lambda turn: setattr(control, "overrides", Overrides(trials=1)) if turn == 9 else None)
    slots = run.run()
    assert 9 <= len(slots) < 14
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert run.ending.kind is EndingKind.FINISHED


def test_patience_ends_the_search_and_a_higher_one_goes_on(loop) -> None:
    store, control = MemorySlots(40), MemoryControl()
    run = loop(store, control, patience=6)
    slots = run.run()
    # The uniform seed is best: six more trials, and one that was in flight.
    assert run.ending.kind is EndingKind.STOPPED
    assert run.ending.detail.startswith("patience: no better loss in ")
    assert finished(store) in (7, 8)
    assert {slot.state for slot in slots} == {SlotState.COMPLETE, SlotState.WAITING}
    before = finished(store)
    assert loop(store, control, patience=6).run() == store.slots()
    assert finished(store) == before, "the same limit hands nothing out"
    loop(store, control, patience=12).run()
    assert finished(store) in (before + 5, before + 6, before + 7)


def test_failures_end_the_search(loop) -> None:
    store, control = MemorySlots(40), MemoryControl()
    run = loop(store, control, max_failures=3)
    run._pool.answer = evaluations(lambda call, s, rule: evaluation(s, float("nan") if call % 2 else None))
    run.run()
    assert run.ending.detail == "max_failures: 3 trial(s) failed, the limit is 3"
    assert sum(slot.state is SlotState.FAILED for slot in store.rows) in (3, 4)


def test_a_rule_met_with_the_last_slot_is_an_ordinary_end(loop) -> None:
    run = loop(MemorySlots(7), MemoryControl(), patience=6)
    assert all(slot.state.finished for slot in run.run())
    assert run.ending.kind is EndingKind.FINISHED


def test_the_last_figures_are_written_down(loop) -> None:
    control = MemoryControl()
    loop(MemorySlots(9), control).run()
    assert control.beats[-1].spent.seconds == pytest.approx(control.beats[-1].worker_seconds / 2)
    assert control.beats[-1].spent.seconds > 5.0


def test_slots_whose_vectors_were_chosen_ahead_are_dropped_like_others(loop) -> None:
    """No worker has them: a vector that no one asked for keeps no slot, and none is handed out twice."""
    store, control = MemorySlots(160), MemoryControl()
    ahead: list[int] = []

    def each(turn: int) -> None:
        control.overrides = Overrides(trials=max(160 - turn, 40))
        ahead.append(len(run._chooser.ahead))

    run = loop(store, control, each, many_workers)
    slots = run.run()
    assert max(ahead) >= 1
    assert len(slots) < 160
    assert [slot.number for slot in slots] == list(range(len(slots)))
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert sorted(store.finishes) == list(range(len(slots)))
