from __future__ import annotations

import pytest

from was_search.slots import Slot, SlotState


@pytest.mark.parametrize(
    ("state", "finished"),
    [("waiting", False), ("running", False), ("complete", True), ("stopped", True), ("failed", True)],
)
def test_a_slot_finishes_in_three_ways(state, finished):
    assert SlotState(state).finished is finished


def test_a_new_slot_has_no_vector():
    slot = Slot(3, SlotState.WAITING)
    assert (slot.attempt, slot.origin, slot.params, slot.losses) == (0, "", None, None)
