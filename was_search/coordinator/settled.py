"""What is known of a search up to a slot, whatever else has ended."""

from __future__ import annotations

import heapq
import math

from was_search.coordinator.slot_table import SlotTable
from was_search.shape import FloatArray
from was_search.studies.origin import OriginKind
from was_search.studies.slots import Slot, best_slot


class Settled:
    """Results of the sampler's slots in the order of their numbers, beside those of all seeds and descents.

    What was known once stays known: the numbers that are asked about rise, but after a restart.

    Args:
        slots: the search's table.
    """

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._first_open = 0
        self._ended = sorted(number for number, slot in slots.items() if slot.state.finished)
        self._best: Slot | None = None
        self._trials: list[FloatArray] = []

    @property
    def first_open(self) -> int:
        """The lowest slot that was not finished when :meth:`reaches` last looked."""
        return self._first_open

    def add(self, number: int) -> None:
        """Note that a slot has finished."""
        heapq.heappush(self._ended, number)

    def reaches(self, number: float) -> bool:
        """Whether all slots up to ``number`` have finished."""
        while (slot := self._slots.get(self._first_open)) is not None and slot.state.finished:
            self._first_open += 1
        return self._first_open > number

    def up_to(self, number: float = math.inf) -> tuple[Slot | None, list[FloatArray]]:
        """The best complete slot, and the losses by sequence of the sampler's slots, of those up to ``number``.

        Seeds' and descents' vectors count whatever their number: they are evaluated before a sampler begins.
        """
        if self._best is None:
            before = (OriginKind.SEED, OriginKind.DESCENT)
            self._best = best_slot([slot for slot in self._slots.values() if slot.source.kind in before])
        while self._ended and self._ended[0] <= number:
            slot = self._slots.get(heapq.heappop(self._ended))
            if slot is None or slot.source.kind is not OriginKind.SAMPLER or slot.losses is None:
                continue
            self._trials.append(slot.losses)
            self._best = best_slot([slot] if self._best is None else [self._best, slot])
        return self._best, self._trials
