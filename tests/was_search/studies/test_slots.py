from __future__ import annotations

import numpy as np
import pytest

from was_search.studies.slots import Slot, SlotState, tokens_saved


@pytest.mark.parametrize(
    ("state", "finished"),
    [("waiting", False), ("running", False), ("complete", True), ("stopped", True), ("failed", True)],
)
def test_a_slot_finishes_in_three_ways(state, finished):
    assert SlotState(state).finished is finished


def test_a_new_slot_has_no_vector():
    slot = Slot(3, SlotState.WAITING)
    assert (slot.attempt, slot.origin, slot.params, slot.losses) == (0, "", None, None)


def test_tokens_saved_against_the_same_trials_in_full():
    def slot(state, n):
        return Slot(0, state, losses=np.zeros(n))

    complete, stopped = slot(SlotState.COMPLETE, 64), slot(SlotState.STOPPED, 8)
    assert tokens_saved([]) == tokens_saved([complete]) == tokens_saved([Slot(1, SlotState.FAILED)]) == 0.0
    assert tokens_saved([complete, stopped, Slot(1, SlotState.FAILED)]) == pytest.approx(1 - 72 / 128)
