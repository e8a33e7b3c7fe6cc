"""Chooses the vectors of a search: seeds, then what the descents end in, then what a sampler suggests.

The vector of a sampler's slot, and when its evaluation stops early, depend on the results of the slots that lie a lag
or more before it, and on no others, even if those have ended. So a search is the same, to the bit, whatever the number
of workers and the order in which they end, up to half as many workers as the lag. With more of them, each choice uses
all that is known. The lag is ``options.lag``, or a sixth of the slots where they are few: the first slots of a sampler
cannot be stopped by what others found.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from was_search.coordinator.descents import Descents
from was_search.coordinator.lookahead import Lookahead
from was_search.coordinator.options import SearchOptions
from was_search.coordinator.settled import Settled
from was_search.coordinator.slot_table import SlotTable
from was_search.masks.early_stop import StopRule, estimated_loss, rung_cuts
from was_search.process.logs import event
from was_search.shape import FloatArray, ModelShape
from was_search.studies.hand_outs import Proposal
from was_search.studies.origin import Origin, OriginKind
from was_search.studies.sampling import MONOTONE, Suggester
from was_search.studies.slots import Slot, SlotState, best_slot
from was_search.vectors.seeds import Seed, point_seed
from was_search.vectors.space import MonotoneSpace, Space, level_params, make_space, open_distributions

_logger = logging.getLogger(__name__)

_PATIENCE = 4.0
"""Evaluations' usual times that a slot is waited for while workers are idle."""

_LEAST_PATIENCE_SECONDS = 2.0


class Chooser:
    """Gives slots their vectors. Knows neither workers nor a database.

    Once the seeds and the descents' vectors have finished, the best of them is the centre of the search space, the
    same one after every restart. What a slot is given is noted in ``slots``; the caller writes it into storage.

    Args:
        slots: the table that the loop uses too.
        shape: the model's.
        seeds: in the order of the first slots.
        options: how the search runs.
        descents: those of the search, None if there are none.
        clock: seconds, to see whether a slot takes long.
    """

    def __init__(
        self,
        slots: SlotTable,
        *,
        shape: ModelShape,
        seeds: list[Seed],
        options: SearchOptions,
        descents: Descents | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._shape = shape
        self._seeds = seeds
        self._options = options
        self._descents = descents
        self._ahead: deque[tuple[int, Proposal]] = deque()
        self._lookahead = Lookahead()
        self._space: Space | None = None
        self._suggester: Suggester | None = None
        self._distributions: Mapping[str, Any] = {}
        self._reference: FloatArray | None = None
        self.fit(1)
        self._settled = Settled(slots)
        self._untold: list[int] = []
        self._clock = clock
        self._waits_since: float | None = None
        self._rules: dict[int, StopRule | None] = {}

    @property
    def ahead(self) -> set[int]:
        """Slots whose vectors were chosen before a worker asked, and are written down nowhere yet."""
        return {number for number, _ in self._ahead}

    def fit(self, n_workers: int) -> None:
        """Note how many workers there are: with too many for the lag, some would wait for results."""
        lag = min(self._options.lag, max(1, len(self._slots) // 6))
        self._back: float = lag if 2 * n_workers <= max(2, lag) else -math.inf

    def forget_ahead(self) -> None:
        """Forget vectors that were chosen and not asked for."""
        self._ahead.clear()

    def evaluated(self, seconds: float) -> None:
        """Note how long an evaluation took: choosing ahead is weighed against it."""
        self._lookahead.evaluated(seconds)

    def finished(self, slot: Slot) -> None:
        """Learn from a slot that has just finished."""
        self._rules.pop(slot.number, None)
        self._settled.add(slot.number)
        if self._suggester is not None:
            heapq.heappush(self._untold, slot.number)

    def stop_rule(self, slot: Slot) -> StopRule | None:
        """The rule by which the slot's evaluation may stop early.

        None for seeds and descents' vectors: they are few, and each may become the centre of the space.
        """
        if not self._options.early_stopping or slot.source.kind is not OriginKind.SAMPLER:
            return None
        if slot.number not in self._rules:
            self._rules[slot.number] = self._rule_for(slot.number)
        return self._rules[slot.number]

    def _rule_for(self, number: int) -> StopRule | None:
        best, trials = self._settled.up_to(number - self._back)
        if best is None or best.losses is None:
            return None
        cuts = rung_cuts(trials, best.losses, self._options.rung_keep)
        return StopRule(best.losses, self._options.significance, cuts)

    def next(self) -> tuple[int, Proposal | None] | None:
        """The next slot to hand out: one with a vector first, else a new proposal; None if there is none now."""
        if (number := self._slots.take_ready()) is not None:
            return number, None
        while self._ahead:
            number, proposal = self._ahead.popleft()
            if number in self._slots:
                return number, proposal
        return self._choose()

    def _choose(self) -> tuple[int, Proposal] | None:
        """A vector for the first slot that has none; None if there is none now."""
        if (number := self._slots.first_free()) is None:
            return None
        missing = [seed for seed in self._seeds if not self._slots.origins[str(Origin.seed(seed.name))]]
        if missing:
            # With fewer slots than seeds the last ones, the best, are kept.
            seed = missing[-self._slots.n_free :][0]
            return number, self._fixed(number, Origin.seed(seed.name), seed.sparsities)
        if self._suggester is None:
            if any(s.source.kind is OriginKind.SEED and not s.state.finished for s in self._slots.values()):
                return None
            if self._descents is not None and not self._descents.finished(self._slots.values()):
                if (proposal := self._descents.next_proposal()) is None:
                    return None
                return number, self._fixed(number, *proposal)
        if not self._may_sample(number):
            return None
        return number, self._sampled(number)

    def choose_ahead(self, n_workers: int) -> bool:
        """Choose one vector that no worker has asked for yet, where that keeps ``n_workers`` busy.

        Returns whether it chose one. The vector is not written down before it is handed out: a crash forgets it, and
        its slot is given another.
        """
        wanted = self._lookahead.depth(n_workers)
        if self._suggester is None or len(self._ahead) >= wanted or (number := self._slots.first_free()) is None:
            return False
        if not self._may_sample(number):
            return False
        self._ahead.append((number, self._sampled(number)))
        return True

    def _fixed(self, number: int, origin: Origin, sparsities: FloatArray) -> Proposal:
        """A vector that no sampler suggested."""
        levels = self._shape.levels(sparsities)
        kinds = open_distributions(self._shape.n_blocks)
        return self._proposal(number, origin, level_params(levels), kinds, levels, sparsities)

    def _may_sample(self, number: int) -> bool:
        """Whether all results are there that the vector of the slot ``number`` depends on.

        A slot that takes several times as long as an evaluation usually does is not waited for: a worker may hang.
        """
        if self._back < 0 or self._settled.reaches(number - self._back):
            self._waits_since = None
            return True
        now = self._clock()
        if self._waits_since is None:
            self._waits_since = now
        usual = self._lookahead.evaluation_seconds
        if usual is None or now - self._waits_since < _PATIENCE * usual + _LEAST_PATIENCE_SECONDS:
            return False
        event(_logger, "a slot takes long, others are chosen without it", slot=self._settled.first_open, chosen=number)
        return True

    def _sampled(self, number: int) -> Proposal:
        if self._suggester is None or self._space is None:
            centre = self._centre_slot()
            self._reference = None if centre is None else centre.losses
            self._space = self._make_space()
            self._distributions = self._space.distributions
            suggester = Suggester(self._options.sampler, self._space, seed=self._options.seed)
            suggester.restore(self._in_space())
            self._suggester = suggester
        started = time.perf_counter()
        while self._untold and self._untold[0] <= number - self._back:
            told = self._slots[heapq.heappop(self._untold)]
            self._suggester.tell(told.number, told.state, self._told(told))
        params = self._suggester.suggest(number)
        sparsities = self._space.sparsities(params)
        origin, levels = Origin.sampler(self._options.sampler), self._shape.levels(sparsities)
        proposal = self._proposal(number, origin, params, self._distributions, levels, sparsities)
        self._lookahead.chose(time.perf_counter() - started)
        return proposal

    def _make_space(self) -> Space:
        if self._options.sampler == MONOTONE:
            greedy = next(seed for seed in self._seeds if seed.name == "greedy-uniform")
            return MonotoneSpace(self._options.budget, greedy.table)
        options = self._options
        return make_space(options.space, self._centre(), options.budget, options.radius)

    def _centre(self) -> Seed:
        """The best of the seeds and the descents' vectors, the latter with a table made through them."""
        best = self._centre_slot()
        if best is None:
            return self._seeds[-1]
        return self._points()[best.origin]

    def _centre_slot(self) -> Slot | None:
        return best_slot([s for s in self._slots.values() if s.source.kind in (OriginKind.SEED, OriginKind.DESCENT)])

    def _points(self) -> dict[str, Seed]:
        """Seeds, and descents' vectors with tables made through them, by their slots' origin."""
        points = {str(Origin.seed(seed.name)): seed for seed in self._seeds}
        for slot in self._slots.values():
            if slot.source.kind is OriginKind.DESCENT and slot.sparsities is not None:
                points[slot.origin] = point_seed(slot.origin, slot.sparsities, self._shape)
        return points

    def _in_space(self) -> list[Slot]:
        """Sampled slots and the seeds that the space holds, with its parameters; it holds no seed of another table."""
        assert self._space is not None
        own = {origin: self._space.locate(seed) for origin, seed in self._points().items()}
        ordered = sorted(self._slots.values(), key=lambda s: s.number)
        seeds = {s.number: params for s in ordered if (params := own.get(s.origin)) is not None}
        slots = [s for s in ordered if s.number in seeds or s.source.kind is OriginKind.SAMPLER]
        return [dataclasses.replace(s, params=seeds.get(s.number, s.params), loss_nats=self._told(s)) for s in slots]

    def _proposal(
        self,
        number: int,
        origin: Origin,
        params: dict[str, float],
        distributions: Mapping[str, Any],
        levels: FloatArray,
        sparsities: FloatArray,
    ) -> Proposal:
        attrs = {
            "nominal_sparsity": round(self._shape.sparsity(sparsities), 6),
            "sparsities": np.round(sparsities, 4).tolist(),
            **({} if self._options.latency is None else self._options.latency.figures(sparsities)),
        }
        changes: dict[str, Any] = {"origin": str(origin), "params": params, "levels": levels, "sparsities": sparsities}
        self._slots[number] = dataclasses.replace(self._slots[number], **changes)
        return Proposal(str(origin), params, distributions, levels, sparsities, attrs)

    def _told(self, slot: Slot) -> float | None:
        """The loss that the sampler is told of a slot; of a stopped one an estimate by the space's centre's losses.

        That vector is the same after every restart, and so is what is told.
        """
        if slot.state is not SlotState.STOPPED or slot.losses is None:
            return slot.loss_nats
        if self._reference is None:
            return slot.loss_nats
        return estimated_loss(slot.losses, self._reference)
