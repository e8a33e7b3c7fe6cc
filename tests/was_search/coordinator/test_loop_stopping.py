"""Trials that are stopped early, in the loop without Ray or Postgres: by which losses, and the same after a restart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.doubles.loop_doubles import bowl, evaluation, in_steps
from tests.doubles.memory_slots import MemorySlots
from was_search.studies.sampling import Suggester
from was_search.studies.slots import Slot, SlotState


def test_seeds_are_evaluated_in_full_and_before_the_first_proposal(run) -> None:
    rules = []

    def answer(call, s, rule):
        rules.append(rule)
        return evaluation(s)

    run(MemorySlots(8), answer)
    assert all(rule is None for rule in rules[:3])
    assert all(rule.significance == 0.1 for rule in rules[3:])


def test_without_early_stopping_every_trial_is_evaluated_in_full(run) -> None:
    rules = []
    run(MemorySlots(8), lambda _, s, rule: (rules.append(rule), evaluation(s))[1], early_stopping=False)
    assert rules == [None] * 8


def test_rungs_compare_with_the_trials_before(run) -> None:
    """LostCalls of eight sequences: a trial that is stopped by its rule has seen fewer."""
    rules: list[Any] = []

    def answer(call, s, rule):
        rules.append(rule)
        return in_steps(s, rule)

    store = MemorySlots(60)
    slots = run(store, answer, significance=1e-9, sampler="random", lag=1)
    assert [rule.cuts for rule in rules[3:7]] == [()] * 4  # two workers: four trials have ended at the seventh
    assert [cut.sequences for cut in rules[-1].cuts] == [1, 2, 4]
    seen = [len(slot.losses) for slot in slots[3:]]
    assert {1, 2, 4, 8} >= set(seen)
    assert 0.3 < np.mean(np.array(seen[10:]) == 1) < 0.7
    assert np.sum(seen) < 0.5 * 8 * len(seen)
    best = min((s for s in slots if s.state is SlotState.COMPLETE), key=lambda s: s.loss_nats)
    # What is stopped cannot be best, and what is best was evaluated on every sequence.
    assert len(best.losses) == 8


def test_a_stopped_trial_has_no_perplexity_to_be_drawn(run) -> None:
    """The dashboard draws any number among the attributes of all trials; its mean is of the first sequences."""
    store = MemorySlots(60)
    slots = run(store, lambda call, s, rule: in_steps(s, rule), significance=1e-9, sampler="random")
    assert {slot.state for slot in slots} == {SlotState.COMPLETE, SlotState.STOPPED}
    for slot in slots:
        kept = {"perplexity", "nll_nats"} if slot.state is SlotState.COMPLETE else set()
        assert set(store.attrs[slot.number]) == kept


def test_a_restarted_search_stops_by_the_same_rungs_and_tells_the_same(run, monkeypatch) -> None:
    told: list[dict[int, float]] = []
    ordinary = Suggester.tell

    def tell(self, number, state, loss_nats):
        told[-1][number] = loss_nats
        ordinary(self, number, state, loss_nats)

    monkeypatch.setattr(Suggester, "tell", tell)
    rules: dict[int, Any] = {}

    def answer(call, s, rule):
        rules[call] = rule
        return in_steps(s, rule)

    store = MemorySlots(40)
    told.append({})
    run(store, answer, sampler="random")
    last = rules[39]
    store.rows.append(Slot(40, SlotState.WAITING))
    told.append({})
    rules.clear()
    run(store, answer, sampler="random")
    assert len(rules) == 1  # the slot that was added
    assert {cut.sequences for cut in rules[0].cuts} == {cut.sequences for cut in last.cuts}
    stopped = [s.number for s in store.slots() if s.state is SlotState.STOPPED]
    assert stopped
    # What a stopped trial is told as is the centre's loss and the difference on what both saw.
    for number in stopped:
        assert told[0].get(number, told[1][number]) == told[1][number]
        assert told[1][number] == pytest.approx(bowl(store.slots()[number].sparsities), abs=1e-9)
