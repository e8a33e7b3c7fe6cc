"""The coordinator's copy of the study's slots in memory, with counts and the best kept up to date.

The table in the database is in ``was_storage.server.schema``.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from was_search.studies.slots import Slot, SlotState


class SlotTable(dict[int, Slot]):
    """Slots by number. Setting one takes the same time however many there are: a study may have ten thousand.

    Attributes:
        counts: slots by state.
        best: the complete slot with the least loss; stopped and failed ones are never best.
        origins: slots by where their vector comes from.
        n_free: waiting slots that have no vector.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        super().__init__()
        self.reload(slots)

    def reload(self, slots: Iterable[Slot]) -> None:
        """Hold ``slots`` and no others."""
        slots = list(slots)
        self.clear()
        self.counts: Counter[SlotState] = Counter()
        self.best: Slot | None = None
        self.origins: Counter[str] = Counter()
        self.n_free = 0
        self._free: list[int] = []
        self._ready: list[int] = []
        self._seen = self._evaluations = self._longest = 0
        for slot in slots:
            self[slot.number] = slot

    def __setitem__(self, number: int, slot: Slot) -> None:
        old = self.get(number)
        if old is not None:
            self.counts[old.state] -= 1
            self.origins[old.origin] -= 1
            self.n_free -= _is_free(old)
        super().__setitem__(number, slot)
        self.counts[slot.state] += 1
        self.origins[slot.origin] += 1
        self.n_free += _is_free(slot)
        if _is_free(slot):
            heapq.heappush(self._free, number)
        elif slot.state is SlotState.WAITING and (old is None or old.state is SlotState.RUNNING):
            heapq.heappush(self._ready, number)
        if slot.state.finished and (old is None or not old.state.finished):
            self._finish(slot)

    @property
    def n_unfinished(self) -> int:
        return sum(n for state, n in self.counts.items() if not state.finished)

    @property
    def unfinished(self) -> bool:
        return self.n_unfinished > 0

    @property
    def saved(self) -> float:
        """Share of tokens that stopping early saved; as :func:`was_search.studies.slots.tokens_saved`."""
        return 1.0 - self._seen / (self._evaluations * self._longest) if self._seen else 0.0

    def take_ready(self) -> int | None:
        """The lowest waiting slot that already has a vector (it was put back, or is from an earlier run), once."""
        while self._ready:
            slot = self.get(number := heapq.heappop(self._ready))
            if slot is not None and slot.state is SlotState.WAITING:
                return number
        return None

    def first_free(self) -> int | None:
        """The lowest waiting slot without a vector; the same one until it is given one."""
        while self._free:
            slot = self.get(number := self._free[0])
            if slot is not None and _is_free(slot):
                return number
            heapq.heappop(self._free)
        return None

    def _finish(self, slot: Slot) -> None:
        if slot.state is SlotState.COMPLETE and slot.loss_nats is not None:
            best = self.best
            key = (slot.loss_nats, slot.number)
            if best is None or best.loss_nats is None or key < (best.loss_nats, best.number):
                self.best = slot
        if slot.state is not SlotState.FAILED and slot.losses is not None:
            self._seen += len(slot.losses)
            self._evaluations += 1
            self._longest = max(self._longest, len(slot.losses))


def _is_free(slot: Slot) -> bool:
    return slot.state is SlotState.WAITING and slot.sparsities is None
