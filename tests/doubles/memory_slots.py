"""A study's slots in memory, with storage's rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from was_search.studies.hand_outs import HandOut, Proposal, Result
from was_search.studies.slots import Slot, SlotState

if TYPE_CHECKING:
    from was_search.coordinator.contracts import SlotStore


class MemorySlots:
    """A ``SlotStore`` in which a slot finishes once, by the attempt that runs.

    Attributes:
        rows: the slots.
        finishes: numbers of the slots of all results, in their order.
        attrs: what was kept with each result.
        shrunk: how many slots were left after each :meth:`shrink`.
    """

    def __init__(self, n: int) -> None:
        self.rows = [Slot(i, SlotState.WAITING) for i in range(n)]
        self.finishes: list[int] = []
        self.attrs: dict[int, dict[str, Any]] = {}
        self.shrunk: list[int] = []

    def slots(self) -> list[Slot]:
        return list(self.rows)

    def trial_of(self, number: int) -> int | None:
        return None

    def begin(self, hand_outs: Sequence[HandOut], lease_seconds: float) -> list[int]:
        for hand_out in hand_outs:
            if hand_out.proposal is not None:
                self._propose(hand_out.number, hand_out.proposal)
        return [self._start(hand_out.number, hand_out.worker) for hand_out in hand_outs]

    def finish_all(self, results: Sequence[Result]) -> list[bool]:
        return [self.finish(**vars(result)) for result in results]

    def finish(self, number: int, attempt: int, state: SlotState, *, attrs: Any = None, **result: Any) -> bool:
        self.finishes.append(number)
        if self.rows[number].state is not SlotState.RUNNING or self.rows[number].attempt != attempt:
            return False
        self.attrs[number] = dict(attrs or {})
        self._set(number, state=state, **result)
        return True

    def requeue(self, number: int, reason: str) -> bool:
        if self.rows[number].state is not SlotState.RUNNING:
            return False
        self._set(number, state=SlotState.WAITING, error=reason)
        return True

    def shrink(self, n_slots: int) -> int:
        used = [slot.number + 1 for slot in self.rows if slot.sparsities is not None]
        del self.rows[max(n_slots, *used, 0) :]
        self.shrunk.append(len(self.rows))
        return len(self.rows)

    def _propose(self, number: int, proposal: Proposal) -> None:
        assert self.rows[number].levels is None
        assert all(proposal.distributions[name]._contains(value) for name, value in proposal.params.items())
        self._set(
            number,
            origin=proposal.origin,
            params=dict(proposal.params),
            levels=proposal.levels,
            sparsities=proposal.sparsities,
        )

    def _start(self, number: int, worker: str) -> int:
        assert self.rows[number].state is SlotState.WAITING
        self._set(number, state=SlotState.RUNNING, attempt=self.rows[number].attempt + 1, worker=worker)
        return self.rows[number].attempt

    def _set(self, number: int, **changes: Any) -> None:
        self.rows[number] = dataclasses.replace(self.rows[number], **changes)


if TYPE_CHECKING:
    _: type[SlotStore] = MemorySlots
