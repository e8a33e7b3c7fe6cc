"""The loop without Ray or Postgres: a store in memory and a pool that answers as it is told."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.doubles.loop_doubles import SHAPE, divergence, evaluation
from tests.doubles.memory_slots import MemorySlots
from was_search.errors import InfeasibleError
from was_search.studies.slots import Slot, SlotState


@pytest.mark.parametrize("space", ["temperature", "additive", "full"])
def test_every_space_is_sampled_on_the_budget(run, space) -> None:
    """Trials lie on the budget, carry the space's parameters, and start near the best seed (here the uniform one)."""
    store = MemorySlots(14)
    slots = run(store, lambda call, sparsities, _: evaluation(sparsities), space=space, radius=0.02)
    sampled = [slot for slot in slots if slot.origin.startswith("sampler:")]
    assert len(sampled) == 11
    names = set(sampled[0].params)
    assert len(names) == {"temperature": 4, "additive": 10, "full": 21}[space]
    for slot in sampled:
        assert set(slot.params) == names
        assert SHAPE.sparsity(slot.sparsities) == pytest.approx(0.6, abs=1e-12)
        np.testing.assert_allclose(slot.levels, SHAPE.levels(slot.sparsities), atol=1e-12)
        # Offsets of block and kind, and the shift that brings the sum back onto the budget.
        assert np.abs(slot.sparsities - 0.6).max() < 4 * 0.02 + 1e-9


def test_every_slot_finishes_once_on_the_budget(run) -> None:
    store = MemorySlots(20)
    slots = run(store, lambda _, s, incumbent: evaluation(s))
    assert sorted(store.finishes) == list(range(20))
    assert [s.origin for s in slots[:3]] == ["seed:uniform", "seed:greedy-uniform", "seed:fisher"]
    assert all(s.origin == "sampler:tpe" for s in slots[3:])
    for slot in slots:
        # exact by projection: float64 rounding only
        assert SHAPE.sparsity(slot.sparsities) == pytest.approx(0.6, abs=1e-12)


def test_the_loss_is_the_fitness_and_perplexity_is_of_the_nll(run) -> None:
    store = MemorySlots(12)
    rules = []

    def answer(call, s, rule):
        rules.append(rule)
        return divergence(s)

    slots = run(store, answer)
    for slot in slots:
        assert slot.loss_nats == pytest.approx(10.0 - slot.nll_nats)
        assert store.attrs[slot.number] == {
            "perplexity": pytest.approx(np.exp(slot.nll_nats), abs=1e-5), "nll_nats": slot.nll_nats,
        }  # fmt: skip
    # the incumbent is the best by divergence, and its losses are divergences
    seeds_best = min(s.loss_nats for s in slots[:3])
    assert rules[3].incumbent.mean() == pytest.approx(seeds_best)
    assert rules[3].incumbent.mean() > max(s.loss_nats for s in slots) - 10


def test_the_nll_of_an_nll_search_is_its_loss(run) -> None:
    slots = run(MemorySlots(6), lambda _, s, __: evaluation(s))
    assert [s.nll_nats for s in slots] == [s.loss_nats for s in slots]


def test_nan_fails_its_slot_and_the_search_goes_on(run) -> None:
    store = MemorySlots(10)
    slots = run(store, lambda call, s, _: evaluation(s, float("nan") if call == 5 else None))
    failed = [s for s in slots if s.state is SlotState.FAILED]
    assert len(failed) == 1
    assert "the loss is nan" in failed[0].error
    assert sum(s.state is SlotState.COMPLETE for s in slots) == 9


def test_infeasible_fails_its_slot(run) -> None:
    def answer(call, s, _):
        if call == 4:
            raise InfeasibleError("scores are not finite")
        return evaluation(s)

    slots = run(MemorySlots(8), answer)
    assert [s.error for s in slots if s.state is SlotState.FAILED] == ["scores are not finite"]


def test_a_study_extended_while_it_runs_is_run_to_its_new_end(run) -> None:
    store = MemorySlots(5)

    def extend(progress) -> None:
        if progress.finished == 4 and len(store.rows) == 5:
            store.rows.extend(Slot(i, SlotState.WAITING) for i in (5, 6))

    slots = run(store, lambda _, s, __: evaluation(s), progress=extend)
    assert len(slots) == 7
    assert all(s.state is SlotState.COMPLETE for s in slots)


def test_drain_ends_with_the_calls_in_flight(run) -> None:
    drain = threading.Event()
    store = MemorySlots(30)
    slots = run(store, lambda _, s, __: evaluation(s), drain=drain, progress=lambda p: p.finished >= 7 and drain.set())
    assert 7 <= sum(s.state.finished for s in slots) <= 9
    assert not any(s.state is SlotState.RUNNING for s in slots)
    before = {s.number: s for s in slots if s.state.finished}
    after = run(store, lambda _, s, __: evaluation(s))
    assert all(s.state.finished for s in after)
    assert all(after[number] == slot or after[number].number == number for number, slot in before.items())
    assert sorted(store.finishes) == list(range(30))


def test_fewer_trials_than_seeds_keep_the_best_seeds(run) -> None:
    store = MemorySlots(1)
    assert run(store, lambda _, s, __: evaluation(s))[0].origin == "seed:fisher"
    store.rows.extend(Slot(i, SlotState.WAITING) for i in range(1, 5))
    origins = [s.origin for s in run(store, lambda _, s, __: evaluation(s))]
    assert sorted(origins[:3]) == ["seed:fisher", "seed:greedy-uniform", "seed:uniform"]
    assert origins[3:] == ["sampler:tpe"] * 2


def test_was_monotone_levels_rise_with_depth(run) -> None:
    slots = run(MemorySlots(12), lambda _, s, __: evaluation(s), sampler="was-monotone")
    for slot in slots[3:]:
        assert np.all(np.diff(slot.levels) >= -1e-12)
