"""Descents in the search loop, without Ray or Postgres: a pool that also descends."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.doubles.descending_pool import DATA, DescendingPool
from tests.doubles.loop_doubles import SHAPE, search_options, seeds
from tests.doubles.memory_slots import MemorySlots
from was_search.coordinator.descents import DescentPlan
from was_search.coordinator.loop import SearchLoop
from was_search.coordinator.model_calls import Evaluate
from was_search.errors import ModelError, TransientError
from was_search.studies.control import Limits
from was_search.studies.slots import SlotState
from was_search.vectors.descent import DescentOptions, chain_steps


@pytest.fixture
def run():
    def start(
        store: MemorySlots,
        pool: DescendingPool,
        *,
        epochs: int = 2,
        chains: int = 2,
        drain=None,
        progress=lambda _: None,
        **more,
    ):
        plan = DescentPlan(epochs, chain_steps(chains), DescentOptions(rounds=12), 4, DATA)
        options = search_options(radius=0.05, early_stopping=False, descents=plan, **more)
        loop = SearchLoop(
            store,
            pool,
            DATA,
            None,
            shape=SHAPE,
            seeds=seeds(),
            options=options,
            drain=drain or threading.Event(),
            progress=progress,
        )
        return loop.run()

    return start


def test_epochs_come_between_seeds_and_sampled_trials_each_from_the_best(run):
    pool = DescendingPool()
    slots = run(MemorySlots(14), pool)
    origins = [slot.origin for slot in slots]
    first, second = (sorted(origins[i : i + 3]) for i in (3, 6))
    assert first == ["descent:0:0", "descent:0:1", "descent:0:mean"]
    assert second == ["descent:1:0", "descent:1:1", "descent:1:mean"]
    assert set(origins[9:]) == {"sampler:tpe"}
    starts, steps, chain_seeds = zip(*pool.descents, strict=True)
    seeds_best = min(slots[:3], key=lambda s: s.loss_nats).sparsities
    np.testing.assert_array_equal(starts[0], seeds_best)
    np.testing.assert_array_equal(starts[2], min(slots[:6], key=lambda s: s.loss_nats).sparsities)
    assert [options.step for options in steps] == [0.04, 0.015, 0.02, 0.0075]
    assert len(set(chain_seeds)) == 4
    assert min(s.loss_nats for s in slots[3:9]) < min(s.loss_nats for s in slots[:3])
    assert all(SHAPE.sparsity(slot.sparsities) == pytest.approx(0.6, abs=1e-12) for slot in slots)
    # Sampled levels lie around the best of all that, on a table through it.
    best = min(slots[:9], key=lambda s: s.loss_nats)
    assert all(np.abs(slot.levels - best.levels).max() < 0.2 for slot in slots[9:])


def test_a_restarted_search_does_not_repeat_its_descents(run):
    store, drain = MemorySlots(14), threading.Event()
    finish = store.finish

    def stop_after_the_first_epoch(number, *args, **kwargs):
        if number == 5:
            drain.set()
        return finish(number, *args, **kwargs)

    store.finish = stop_after_the_first_epoch
    first = DescendingPool()
    run(store, first, drain=drain)
    assert len(first.descents) == 2
    store.finish = finish
    second = DescendingPool()
    slots = run(store, second)
    assert [step.step for _, step, _ in second.descents] == [0.02, 0.0075]
    undisturbed = run(MemorySlots(14), DescendingPool())
    for ours, theirs in zip(slots[:9], undisturbed[:9], strict=True):
        np.testing.assert_array_equal(ours.sparsities, theirs.sparsities)


def test_lost_chains_are_repeated_and_give_the_same(run):
    disturbed, undisturbed = run(MemorySlots(12), DescendingPool(lose=2)), run(MemorySlots(12), DescendingPool())
    for ours, theirs in zip(disturbed[:9], undisturbed[:9], strict=True):
        np.testing.assert_array_equal(
            next(s.sparsities for s in disturbed if s.origin == theirs.origin), theirs.sparsities
        )
        assert ours.state is SlotState.COMPLETE


def test_a_chain_lost_too_often_ends_the_search_and_consumes_no_slot(run):
    store = MemorySlots(12)
    with pytest.raises(TransientError, match="a descent was lost 3 times, last on worker-0: gone"):
        run(store, DescendingPool(lose=99, n_workers=1))
    assert [slot.state for slot in store.rows[3:]] == [SlotState.WAITING] * 9


def test_an_error_of_a_chain_ends_the_search(run):
    with pytest.raises(ModelError, match="weights are gone"):
        run(MemorySlots(12), DescendingPool(broken=ModelError("weights are gone")))


def test_with_few_slots_the_mean_comes_first(run):
    slots = run(MemorySlots(4), DescendingPool())
    assert slots[3].origin == "descent:0:mean"


def test_one_chain_has_no_mean(run):
    slots = run(MemorySlots(5), DescendingPool(), epochs=1, chains=1)
    assert [slot.origin for slot in slots[3:]] == ["descent:0:0", "sampler:tpe"]


def endless() -> DescendingPool:
    """Its descents never end by themselves: all evaluations do."""
    return DescendingPool(due=lambda running: [given for given in running if isinstance(given.call, Evaluate)][:1])


@pytest.mark.parametrize("how", ["limit", "drain"])
def test_the_end_of_a_search_does_not_wait_for_a_descent(run, how):
    """Its worker is free for what comes next, and a later run descends from the same vector."""
    store, pool, drain = MemorySlots(12), endless(), threading.Event()

    def progress(shown):
        if shown.activity and how == "drain":
            drain.set()

    limits = Limits(max_seconds=0.5 if how == "limit" else 0.0)
    slots = run(store, pool, drain=drain, progress=progress, limits=limits)
    assert pool.abandoned == 1
    assert pool.n_idle == 2
    assert [slot.state for slot in slots[3:]] == [SlotState.WAITING] * 9
    again, undisturbed = run(store, DescendingPool()), run(MemorySlots(12), DescendingPool())
    for ours, theirs in zip(again[:9], undisturbed[:9], strict=True):
        np.testing.assert_array_equal(ours.sparsities, theirs.sparsities)


def test_workers_are_left_alone_where_no_descent_is_under_way(run):
    pool = endless()
    slots = run(MemorySlots(5), pool, epochs=0)
    assert pool.abandoned == 0
    assert all(slot.state is SlotState.COMPLETE for slot in slots)


def test_what_goes_on_is_shown_once(run):
    shown = []
    run(MemorySlots(9), DescendingPool(), chains=1, progress=shown.append)
    activities = [progress.activity for progress in shown]
    assert activities.count("descent 1 of 2, 1 chain(s) of 12 rounds") == 1
    assert activities.count("descent 2 of 2, 1 chain(s) of 12 rounds") == 1
    assert activities[-1] == ""
