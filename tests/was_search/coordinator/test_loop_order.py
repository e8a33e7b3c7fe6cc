"""A search is the same however many workers evaluate and in whatever order they end, up to half the lag."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness.pool_double import PoolDouble
from tests.doubles.loop_doubles import evaluations, in_steps
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator import chooser
from was_search.studies.slots import SlotState


def shuffled(n_workers: int, seed: int, lose: int = 0):
    """``n_workers`` of which some end at a look, by chance; every ``lose``-th call is lost."""
    rng = np.random.default_rng(seed)

    def due(running):
        return [given for given in running if rng.random() < 0.3]

    def make(answer):
        of = evaluations(answer)

        def lossy(given):
            if lose and given.ticket % lose == lose - 1:
                raise ConnectionError("gone")
            return of(given)

        return PoolDouble(lossy, n_workers, due=due)

    return make


def searched(run, pool, n: int = 100, **options):
    slots = run(MemorySlots(n), lambda _, s, rule: in_steps(s, rule), pool=pool, significance=1e-9, **options)
    return [(slot.origin, slot.state, slot.params, tuple(slot.losses)) for slot in slots]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "random", "was-monotone"])
def test_workers_and_their_order_change_nothing(run, sampler):
    expected = searched(run, shuffled(1, 0), sampler=sampler)
    assert {state for _, state, _, _ in expected} == {SlotState.COMPLETE, SlotState.STOPPED}
    for n_workers, seed in ((2, 1), (3, 2), (8, 3), (8, 4)):
        assert searched(run, shuffled(n_workers, seed), sampler=sampler) == expected


def test_lost_calls_change_nothing(run):
    expected = searched(run, shuffled(1, 0))
    assert searched(run, shuffled(5, 7, lose=6)) == expected


def test_a_lag_of_one_uses_all_that_is_known(run):
    found = [searched(run, shuffled(n, seed), lag=1) for n, seed in ((1, 0), (8, 3))]
    assert found[0] != found[1]
    assert found[0] != searched(run, shuffled(1, 0))


def test_more_workers_than_half_the_lag_do_not_wait(run):
    idle = []

    def make(answer):
        pool = PoolDouble(evaluations(answer), 9, due=lambda running: running[1:2] or running)
        ordinary = pool.wait
        pool.wait = lambda seconds: (idle.append(pool.n_idle), ordinary(seconds))[1]
        return pool

    searched(run, make, lag=16)
    assert sum(idle[3:-9]) == 0


def test_of_few_slots_a_sixth_is_the_lag(run):
    expected = searched(run, shuffled(1, 0), n=48)
    assert expected == searched(run, shuffled(4, 5), n=48)
    assert expected == searched(run, shuffled(1, 0), n=48, lag=8)
    assert expected != searched(run, shuffled(1, 0), n=48, lag=4)


def test_a_slot_that_takes_long_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(chooser, "_LEAST_PATIENCE_SECONDS", 0.05)

    def make(answer):
        # The seventh call ends when nothing else is left to end.
        return PoolDouble(
            evaluations(answer), 4, due=lambda running: [g for g in running if g.ticket != 6][:1] or last(running)
        )

    def last(running):
        return running if ended_others else []

    ended_others = []
    store = MemorySlots(40)

    def progress(seen):
        if sum(slot.state.finished for slot in store.slots()) == 39:
            ended_others.append(True)

    slots = run(store, lambda _, s, rule: in_steps(s, rule), pool=make, progress=progress)
    assert all(slot.state.finished for slot in slots)


def test_what_a_restart_finds_is_used(run):
    """Slots of an earlier run count, whichever of them have ended."""
    store = MemorySlots(60)
    stopped = []

    def break_off(call, s, rule):
        if call == 40 and not stopped:
            stopped.append(True)
            raise ValueError("broken off")
        return in_steps(s, rule)

    with pytest.raises(ValueError, match="broken off"):
        run(store, break_off, pool=shuffled(4, 1), significance=1e-9)
    slots = run(store, lambda _, s, rule: in_steps(s, rule), pool=shuffled(4, 1), significance=1e-9)
    assert all(slot.state.finished for slot in slots)
    assert sum(slot.state is SlotState.STOPPED for slot in slots) > 5
