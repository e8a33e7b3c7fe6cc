"""What the table keeps up to date is what counting all slots gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from was_search.coordinator.slot_table import SlotTable
from was_search.studies.slots import Slot, SlotState, best_slot, tokens_saved

VECTOR = np.full((2, 7), 0.5)


def assert_counted(table: SlotTable) -> None:
    slots = list(table.values())
    for state in SlotState:
        assert table.counts[state] == sum(slot.state is state for slot in slots)
    assert table.best == best_slot(slots)
    assert table.saved == pytest.approx(tokens_saved(slots))
    assert table.unfinished == any(not slot.state.finished for slot in slots)
    assert table.n_free == sum(slot.state is SlotState.WAITING and slot.sparsities is None for slot in slots)
    assert {origin for origin, n in table.origins.items() if n} == {slot.origin for slot in slots}


def test_a_random_life_is_counted() -> None:
    rng = np.random.default_rng(0)
    table = SlotTable(Slot(number, SlotState.WAITING) for number in range(40))
    assert_counted(table)
    running: list[int] = []
    for step in range(300):
        kind = rng.integers(4)
        if kind < 2 and (number := table.take_ready()) is not None:
            assert table[number].sparsities is not None
            table[number] = dataclasses.replace(table[number], state=SlotState.RUNNING)
            running.append(number)
        elif kind < 2 and (number := table.first_free()) is not None:
            assert number == min(s.number for s in table.values() if s.sparsities is None)
            table[number] = dataclasses.replace(table[number], origin=f"o{step % 3}", sparsities=VECTOR)
            table[number] = dataclasses.replace(table[number], state=SlotState.RUNNING)
            running.append(number)
        elif running:
            number = running.pop(int(rng.integers(len(running))))
            states = (SlotState.WAITING, SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED)
            state = states[rng.integers(4)]
            losses = rng.normal(2.0, 1.0, int(rng.integers(1, 9)))
            result = {"losses": losses, "loss_nats": float(losses.mean())} if state.finished else {}
            table[number] = dataclasses.replace(table[number], state=state, **result)
        assert_counted(table)
    assert table.first_free() is None
    assert table.counts[SlotState.COMPLETE] > 3
    again = SlotTable(table.values())  # as after a restart
    assert_counted(again)
    ready = list(iter(again.take_ready, None))
    assert ready == [s.number for s in table.values() if s.state is SlotState.WAITING]


def test_a_vector_that_waits_is_given_out_once_and_again_when_put_back() -> None:
    table = SlotTable([Slot(3, SlotState.WAITING, sparsities=VECTOR), Slot(1, SlotState.WAITING)])
    assert table.take_ready() == 3
    assert table.take_ready() is None
    table[3] = dataclasses.replace(table[3], state=SlotState.RUNNING)
    table[3] = dataclasses.replace(table[3], state=SlotState.WAITING)
    assert table.take_ready() == 3
    assert table.first_free() == table.first_free() == 1


def test_slots_that_are_gone_are_not_given_out() -> None:
    table = SlotTable([Slot(0, SlotState.WAITING, sparsities=VECTOR), Slot(1, SlotState.WAITING)])
    dict.pop(table, 0)
    dict.pop(table, 1)
    assert table.take_ready() is None
    assert table.first_free() is None
