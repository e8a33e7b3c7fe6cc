"""Many workers, in the loop without Ray or Postgres: vectors chosen ahead, and results that come together."""

from __future__ import annotations

import threading

import numpy as np

from tests.doubles.loop_doubles import evaluation, many_workers
from tests.doubles.memory_slots import MemorySlots
from was_search.studies.sampling import Suggester
from was_search.studies.slots import SlotState


def test_a_large_pool_gets_vectors_that_were_chosen_ahead(run, monkeypatch) -> None:
    """Chosen while all workers are busy, written down when handed out, and each slot finishes once all the same."""
    order: list[str] = []
    suggest, begins = Suggester.suggest, MemorySlots.begin

    def watched(self, number):
        order.append("choose")
        return suggest(self, number)

    def begin(self, hand_outs, lease_seconds):
        order.extend(["hand out"] * len(hand_outs))
        return begins(self, hand_outs, lease_seconds)

    monkeypatch.setattr(Suggester, "suggest", watched)
    monkeypatch.setattr(MemorySlots, "begin", begin)
    store = MemorySlots(120)
    run(store, lambda _, s, __: evaluation(s), pool=many_workers)
    assert sorted(store.finishes) == list(range(120))
    ahead = np.cumsum([1 if step == "choose" else -1 for step in order[3:]])
    assert ahead.max() >= 1
    assert ahead[-1] == 0  # none was chosen for nothing


def test_a_drain_forgets_what_was_chosen_ahead(run) -> None:
    drain = threading.Event()
    store = MemorySlots(120)
    enough = {"drain": drain, "progress": lambda p: p.finished < 60 or drain.set()}
    run(store, lambda _, s, __: evaluation(s), pool=many_workers, **enough)
    left = [slot for slot in store.slots() if slot.state is SlotState.WAITING]
    assert left
    assert all(slot.sparsities is None for slot in left)
    slots = run(store, lambda _, s, __: evaluation(s), pool=many_workers)
    assert all(slot.state is SlotState.COMPLETE for slot in slots)
    assert sorted(store.finishes) == list(range(120))


def test_results_that_come_together_are_booked_together(run, monkeypatch) -> None:
    """Results before errors: a slot that was lost too often fails only because another one has succeeded."""
    sizes: list[int] = []
    finish_all = MemorySlots.finish_all
    monkeypatch.setattr(
        MemorySlots, "finish_all", lambda self, results: sizes.append(len(results)) or finish_all(self, results)
    )
    store = MemorySlots(80)
    slots = run(store, lambda call, s, _: evaluation(s, float("nan") if call % 9 == 8 else None), pool=many_workers)
    assert max(sizes) > 8
    assert sum(sizes) == 80
    assert {s.state for s in slots} == {SlotState.COMPLETE, SlotState.FAILED}
