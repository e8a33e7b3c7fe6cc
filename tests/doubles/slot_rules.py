"""The rules of ``SlotStore``, for any store with four waiting slots: a class of tests."""

from __future__ import annotations

import numpy as np

from tests.doubles.small_study import finish, hand_out, vector
from was_search.coordinator.contracts import SlotStore
from was_search.studies.hand_outs import HandOut, Proposal, Result
from was_search.studies.slots import SlotState


class SlotRules:
    """To be inherited with a fixture ``store``."""

    def test_slots_wait_without_a_vector_at_first(self, store: SlotStore) -> None:
        slots = store.slots()
        assert [slot.number for slot in slots] == [0, 1, 2, 3]
        assert all(slot.state is SlotState.WAITING and slot.sparsities is None for slot in slots)
        assert [slot.attempt for slot in slots] == [0] * 4

    def test_a_slot_is_handed_out_with_its_vector(self, store: SlotStore) -> None:
        given = [HandOut(n, f"w{n}", Proposal(**vector(n))) for n in (2, 0)]
        assert store.begin(given, 60) == [1, 1]
        slots = store.slots()
        assert [slot.state for slot in slots] == [
            SlotState.RUNNING, SlotState.WAITING, SlotState.RUNNING, SlotState.WAITING,
        ]  # fmt: skip
        assert (slots[2].worker, slots[2].attempt, slots[2].origin) == ("w2", 1, "sampler:tpe")
        assert slots[2].params == vector(2)["params"]
        np.testing.assert_array_equal(slots[2].levels, vector(2)["levels"])
        np.testing.assert_array_equal(slots[2].sparsities, vector(2)["sparsities"])

    def test_a_slot_that_is_put_back_keeps_its_vector_and_its_attempts(self, store: SlotStore) -> None:
        hand_out(store, 1)
        assert store.requeue(1, "its worker died")
        assert not store.requeue(1, "again"), "it is not running any more"
        slot = store.slots()[1]
        assert (slot.state, slot.attempt, slot.error) == (SlotState.WAITING, 1, "its worker died")
        assert store.begin([HandOut(1, "other")], 60) == [2]
        slot = store.slots()[1]
        assert (slot.state, slot.attempt, slot.worker) == (SlotState.RUNNING, 2, "other")
        np.testing.assert_array_equal(slot.sparsities, vector(1)["sparsities"])

    def test_a_result_counts_once_and_of_the_attempt_that_runs(self, store: SlotStore) -> None:
        hand_out(store, 0)
        assert store.requeue(0, "")
        assert store.begin([HandOut(0, "other")], 60) == [2]
        late = Result(0, 1, SlotState.FAILED, error="late")
        result = Result(0, 2, SlotState.COMPLETE, losses=[2.0, 3.0], loss_nats=2.5, nll_nats=2.5, tokens=9, worker="w")
        assert store.finish_all([late]) == [False]
        assert store.finish_all([result]) == [True]
        assert store.finish_all([result]) == [False]
        slot = store.slots()[0]
        assert (slot.state, slot.loss_nats, slot.tokens, slot.error) == (SlotState.COMPLETE, 2.5, 9, "")
        np.testing.assert_array_equal(slot.losses, [2.0, 3.0])
        assert not store.requeue(0, "it has finished")

    def test_of_several_results_at_once_the_first_of_the_attempt_that_runs_counts(self, store: SlotStore) -> None:
        hand_out(store, 0)
        assert store.requeue(0, "")
        assert store.begin([HandOut(0, "other")], 60) == [2]
        late = Result(0, 1, SlotState.FAILED, error="late")
        first, second = (
            Result(0, 2, SlotState.COMPLETE, losses=[nats] * 3, loss_nats=nats, nll_nats=nats, tokens=9, worker="w")
            for nats in (2.0, 1.0)
        )
        assert store.finish_all([late, first, second]) == [False, True, False]
        assert store.finish_all([late, first, second]) == [False, False, False]
        assert (store.slots()[0].state, store.slots()[0].loss_nats) == (SlotState.COMPLETE, 2.0)

    def test_a_slot_that_failed_says_why(self, store: SlotStore) -> None:
        assert finish(store, 3, hand_out(store, 3), SlotState.FAILED, error="lost 3 times")
        assert (store.slots()[3].state, store.slots()[3].error) == (SlotState.FAILED, "lost 3 times")

    def test_a_store_shrinks_to_what_has_no_vector(self, store: SlotStore) -> None:
        hand_out(store, 1)
        assert store.requeue(1, "")
        assert store.shrink(3) == 3
        assert store.shrink(1) == 2, "the second slot has a vector"
        assert [slot.number for slot in store.slots()] == [0, 1]
        assert store.shrink(9) == 2

    def test_trials_are_of_slots_that_were_handed_out(self, store: SlotStore) -> None:
        assert store.trial_of(0) is None
