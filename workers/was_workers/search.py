"""The coordinator's loop: choose vectors, hand slots out, commit results. One per study; owns no truth."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from was_search.control import LAST_SLOT, NO_LIMITS, Control, Limits
from was_search.divergence import DenseTop
from was_search.early_stop import StopRule, estimated_loss, rung_cuts
from was_search.errors import InfeasibleError, TransientError
from was_search.hand_out import HandOut, Proposal, Result
from was_search.histogram import Histograms
from was_search.protocol import Evaluation, TokenSet, perplexity
from was_search.sampling import SamplerName, Suggester
from was_search.seeds import Seed, point_seed
from was_search.shape import FloatArray, ModelShape
from was_search.slots import Slot, SlotState, best_slot
from was_search.space import MonotoneSpace, Space, SpaceName, level_params, make_space, open_distributions
from was_workers.ahead import Lookahead
from was_workers.descents import ORIGIN as DESCENT
from was_workers.descents import DescentPlan, Descents
from was_workers.pool import Outcome, Pool
from was_workers.slot_book import SlotBook, durable
from was_workers.slot_table import SlotTable
from was_workers.steering import Desk, Steering

_TOGETHER_SECONDS = 0.05
"""Vectors chosen within this time are committed together: a commit costs more than a further trial in it."""

_HAND_OUT_SECONDS = 1.0
"""Then results that have come meanwhile are looked at, before more is handed out."""


@dataclass(frozen=True)
class SearchOptions:
    """How a search runs; see :class:`was_search.settings.Settings` for each."""

    target: float
    sampler: SamplerName
    radius: float
    seed: int
    early_stopping: bool
    significance: float
    rung_keep: float
    trial_timeout: float
    max_attempts: int
    descents: DescentPlan | None = None
    space: SpaceName = "levels"
    limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class SearchProgress:
    """The state of a study, for a progress bar.

    ``best`` is the best complete slot; ``saved`` the share of tokens that stopping early saved; ``current`` the slot
    that has just finished; ``activity`` what goes on besides evaluations.
    """

    total: int
    complete: int
    stopped: int
    failed: int
    best: Slot | None
    current: Slot | None
    saved: float = 0.0
    activity: str = ""

    @property
    def finished(self) -> int:
        return self.complete + self.stopped + self.failed


class SearchLoop:
    """Runs a study to its last slot, or until a rule or somebody ends it.

    Seeds come first and are evaluated in full, then come the descents' vectors. Once all have finished, the best of
    them is the centre of the search space, the same one after every restart.

    Args:
        book: the study's slots, guarded by the coordinator's lock.
        pool: workers.
        data: tokens of the search split.
        histograms: at the operating point, with a ``key`` that names them.
        shape: the model's.
        seeds: in the order of the first slots.
        options: see there.
        top: the dense model's top of ``data``, which makes the divergence from it the fitness; None for the NLL.
        drain: once set, nothing more is handed out and the loop ends with the calls in flight.
        desk: where others ask for a pause, another number of workers and so on; None where nobody does.
        progress: called after every finished slot.
        clock: seconds, for limits and for how often the desk is asked.

    Attributes:
        ending: how the run ended.
    """

    def __init__(
        self,
        book: SlotBook,
        pool: Pool,
        data: TokenSet,
        histograms: Histograms,
        key: str,
        *,
        shape: ModelShape,
        seeds: list[Seed],
        options: SearchOptions,
        top: DenseTop | None = None,
        drain: threading.Event,
        desk: Desk | None = None,
        progress: Callable[[SearchProgress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._book = durable(book)
        self._pool = pool
        self._data = ray.put(data)
        self._top = None if top is None else ray.put(top)
        self._histograms = ray.put(histograms)
        self._key = key
        self._shape = shape
        self._seeds = seeds
        self._options = options
        self._progress = progress
        self._slots = SlotTable(book.slots())
        self._ahead: deque[tuple[int, Proposal]] = deque()
        self._lookahead = Lookahead()
        self._results: list[tuple[Result, dict[str, Any]]] = []
        self._steering = Steering(
            desk, pool, limits=options.limits, drain=drain, slots=list(self._slots.values()), clock=clock
        )
        self.ending = LAST_SLOT
        self._flight: dict[int, tuple[int, int, float]] = {}
        self._losses: Counter[int] = Counter()
        self._space: Space | None = None
        self._suggester: Suggester | None = None
        self._distributions: Mapping[str, Any] = {}
        self._reference: FloatArray | None = None
        ended = [s for s in self._slots.values() if s.origin.startswith("sampler:") and s.losses is not None]
        ended.sort(key=lambda s: (s.finished_at is None, s.finished_at, s.number))
        self._trials: list[FloatArray] = [s.losses for s in ended if s.losses is not None]
        self._descents: Descents | None = None
        if options.descents is not None and options.descents.epochs:
            self._descents = Descents(
                options.descents,
                pool,
                self._histograms,
                shape=shape,
                target=options.target,
                seed=options.seed,
                # An evaluation may take trial_timeout; a backward pass keeps fewer tokens a second.
                seconds_per_token=2.0 * options.trial_timeout / data.protocol.predicted_tokens,
                max_attempts=options.max_attempts,
            )

    def run(self) -> list[Slot]:
        """All slots at the end; some are unfinished if :attr:`ending` says that the loop did not reach it.

        Raises:
            WasError: a worker met an error that repeating cannot mend; the slot is not consumed.
        """
        self._report(None)
        try:
            while self._goes_on():
                more = False
                if self._steering.open:
                    more = self._hand_out() or self._choose_ahead()
                if errors := self._settle_all(self._pool.wait(0.0 if more else 0.5)):
                    raise errors[0]
        except Exception as error:
            self._put_back(f"the search stopped: {_first_line(error)}")
            raise
        self._steering.beat()
        slots = self._book.slots()
        if self._steering.ending is not None and not all(slot.state.finished for slot in slots):
            self.ending = self._steering.ending
        return slots

    def _goes_on(self) -> bool:
        """Whether the loop has another turn; does what is asked of it first."""
        was_paused = self._steering.paused
        control = self._steering.steer()
        if (control is not None and self._fit(control)) or was_paused != self._steering.paused:
            self._report(None)
        if self._steering.cancelled:
            self._pool.abandon()
            self._put_back("cancelled")
            return False
        return bool(self._flight) or (self._steering.ending is None and self._unfinished())

    def _put_back(self, reason: str) -> None:
        """Requeue what is in flight."""
        for number, _, _ in self._flight.values():
            self._book.requeue(number, reason)
        self._flight.clear()
        self._ahead.clear()

    def _fit(self, control: Control) -> bool:
        """Take in slots that were added, and remove those that are no longer wanted; whether there were any."""
        before = len(self._slots)
        for number in range(before, control.n_slots):
            self._slots[number] = Slot(number, SlotState.WAITING)
        trials = control.overrides.trials
        if trials is not None and trials < len(self._slots):
            ahead = {number for number, _ in self._ahead}
            used = [s.number + 1 for s in self._slots.values() if not (_untouched(s) or s.number in ahead)]
            if max(trials, *used, 0) < len(self._slots):
                self._keep(self._book.shrink(trials), ahead)
        return len(self._slots) != before

    def _keep(self, n_slots: int, ahead: set[int]) -> None:
        """Forget the slots from ``n_slots`` on. Those ``ahead`` have a vector that is written down nowhere yet."""
        kept = [slot for slot in self._slots.values() if slot.number < n_slots]
        self._slots = SlotTable(s if s.number not in ahead else Slot(s.number, SlotState.WAITING) for s in kept)
        for slot in kept:
            if slot.number in ahead:
                self._slots[slot.number] = slot

    def _unfinished(self) -> bool:
        if not self._slots.unfinished:
            # Someone may have extended the study while it ran.
            self._slots = SlotTable(self._book.slots())
        return self._slots.unfinished

    def _hand_out(self) -> bool:
        """Give idle workers something to do; True where time was up before all of them had."""
        end = time.monotonic() + _HAND_OUT_SECONDS
        while self._pool.n_idle:
            if time.monotonic() > end:
                return True
            together = self._choose_together()
            if not together:
                if self._descents is not None and self._descents.hand_out():
                    self._report(None)
                return False
            # Committed before it is sent: an evaluation that no slot knows of cannot happen.
            attempts = self._book.begin(together, self._options.trial_timeout)
            for hand_out, attempt in zip(together, attempts, strict=True):
                self._send(hand_out, attempt)
        return False

    def _choose_together(self) -> list[HandOut]:
        """Slots for idle workers in the order that the pool takes them, as many as are chosen in a moment."""
        end = time.monotonic() + _TOGETHER_SECONDS
        chosen: list[HandOut] = []
        for worker in self._pool.idle_names:
            if (found := self._next()) is None:
                break
            number, proposal = found
            chosen.append(HandOut(number, worker, proposal))
            if time.monotonic() > end:
                break
        return chosen

    def _send(self, hand_out: HandOut, attempt: int) -> None:
        slot = self._slots[hand_out.number]
        ticket = self._pool.submit(
            "evaluate",
            self._data,
            self._key,
            self._histograms,
            slot.sparsities,
            self._stop_rule(slot),
            self._top,
            deadline_seconds=self._options.trial_timeout,
        )
        self._flight[ticket] = (hand_out.number, attempt, time.monotonic())
        self._refresh(hand_out.number, state=SlotState.RUNNING, attempt=attempt, worker=hand_out.worker)

    def _stop_rule(self, slot: Slot) -> StopRule | None:
        """None for seeds and descents' vectors: few, and each may become the centre of the space."""
        best = self._slots.best
        if not self._options.early_stopping or not slot.origin.startswith("sampler:") or best is None:
            return None
        assert best.losses is not None
        cuts = rung_cuts(self._trials, best.losses, self._options.rung_keep)
        return StopRule(best.losses, self._options.significance, cuts)

    def _next(self) -> tuple[int, Proposal | None] | None:
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
        missing = [seed for seed in self._seeds if not self._slots.origins[f"seed:{seed.name}"]]
        if missing:
            # With fewer slots than seeds the last ones, the best, are kept.
            seed = missing[-self._slots.n_free :][0]
            return number, self._fixed(number, f"seed:{seed.name}", seed.sparsities)
        if self._suggester is None:
            if any(s.origin.startswith("seed:") and not s.state.finished for s in self._slots.values()):
                return None
            if self._descents is not None and not self._descents.finished(self._slots.values()):
                if (proposal := self._descents.next_proposal()) is None:
                    return None
                return number, self._fixed(number, *proposal)
        return number, self._sampled(number)

    def _choose_ahead(self) -> bool:
        """Choose one vector that no worker has asked for yet, where that keeps them busy; whether it did.

        It is not written down before it is handed out: a crash forgets it, and its slot is given another.
        """
        wanted = self._lookahead.depth(len(self._flight) + self._pool.n_idle)
        if self._suggester is None or len(self._ahead) >= wanted or (number := self._slots.first_free()) is None:
            return False
        self._ahead.append((number, self._sampled(number)))
        return True

    def _fixed(self, number: int, origin: str, sparsities: FloatArray) -> Proposal:
        """A vector that no sampler suggested."""
        levels = self._shape.levels(sparsities)
        kinds = open_distributions(self._shape.n_blocks)
        return self._proposal(number, origin, level_params(levels), kinds, levels, sparsities)

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
        params = self._suggester.suggest(number)
        sparsities = self._space.sparsities(params)
        origin, levels = f"sampler:{self._options.sampler}", self._shape.levels(sparsities)
        proposal = self._proposal(number, origin, params, self._distributions, levels, sparsities)
        self._lookahead.chose(time.perf_counter() - started)
        return proposal

    def _make_space(self) -> Space:
        if self._options.sampler == "was-monotone":
            greedy = next(seed for seed in self._seeds if seed.name == "greedy-uniform")
            return MonotoneSpace(self._shape, greedy.table, self._options.target)
        options = self._options
        return make_space(options.space, self._shape, self._centre(), options.target, options.radius)

    def _centre(self) -> Seed:
        """The best of the seeds and of the descents' vectors; those have a table made through them."""
        best = self._centre_slot()
        if best is None:
            return self._seeds[-1]
        return next(seed for seed in [*self._seeds, *self._descended()] if _origin(seed) == best.origin)

    def _centre_slot(self) -> Slot | None:
        return best_slot([s for s in self._slots.values() if s.origin.startswith(("seed:", DESCENT))])

    def _descended(self) -> list[Seed]:
        """The descents' vectors with tables made through them."""
        return [
            point_seed(slot.origin, slot.sparsities, self._shape)
            for slot in self._slots.values()
            if slot.origin.startswith(DESCENT) and slot.sparsities is not None
        ]

    def _in_space(self) -> list[Slot]:
        """Sampled slots, and the seeds that the space holds (one of another table is none), by its parameters."""
        assert self._space is not None
        fixed = [*self._seeds, *self._descended()]
        own = {_origin(seed): self._space.locate(seed) for seed in fixed}
        ordered = sorted(self._slots.values(), key=lambda s: s.number)
        seeds = {s.number: params for s in ordered if (params := own.get(s.origin)) is not None}
        slots = [s for s in ordered if s.number in seeds or s.origin.startswith("sampler:")]
        return [dataclasses.replace(s, params=seeds.get(s.number, s.params), loss_nats=self._told(s)) for s in slots]

    def _proposal(
        self,
        number: int,
        origin: str,
        params: dict[str, float],
        distributions: Mapping[str, Any],
        levels: FloatArray,
        sparsities: FloatArray,
    ) -> Proposal:
        attrs = {
            "nominal_sparsity": round(self._shape.sparsity(sparsities), 6),
            "sparsities": np.round(sparsities, 4).tolist(),
        }
        self._refresh(number, origin=origin, params=params, levels=levels, sparsities=sparsities)
        return Proposal(origin, params, distributions, levels, sparsities, attrs)

    def _settle_all(self, outcomes: list[Outcome]) -> list[BaseException]:
        """Book outcomes, results in one go before anything is put back; returns the errors that end the search."""
        errors = []
        for outcome in sorted(outcomes, key=lambda outcome: outcome.error is not None):
            if outcome.error is not None:
                self._commit_results()
            if error := self._settle(outcome):
                errors.append(error)
        self._commit_results()
        return errors

    def _commit_results(self) -> None:
        results, self._results = self._results, []
        if results:
            self._book.finish_all([result for result, _ in results])
        for result, changes in results:
            self._done(result.number, result.state, changes)

    def _settle(self, outcome: Outcome) -> BaseException | None:
        """Book an outcome; returns an error that ends the search, its slot put back."""
        if self._descents is not None and self._descents.owns(outcome.ticket):
            return self._descents.settle(outcome)
        if outcome.ticket not in self._flight:
            return None  # left in flight by a phase that raised
        number, attempt, started = self._flight.pop(outcome.ticket)
        error = outcome.error
        if error is None:
            self._lookahead.evaluated(time.monotonic() - started)
            self._finish_evaluation(number, attempt, outcome, outcome.value)
            return None
        seconds = time.monotonic() - started
        if isinstance(error, InfeasibleError):
            self._fail(number, attempt, outcome.worker, seconds, _first_line(error))
            return None
        reason = f"{type(error).__name__} on {outcome.worker}: {_first_line(error)}"
        mendable = outcome.lost or isinstance(error, TransientError)
        if mendable:
            self._losses[number] += 1
        spent = self._losses[number] >= self._options.max_attempts
        if mendable and spent and self._slots.best is not None:
            self._fail(number, attempt, outcome.worker, seconds, f"lost {self._losses[number]} times; last: {reason}")
            return None
        self._book.requeue(number, reason)
        self._refresh(number, state=SlotState.WAITING)
        if mendable and spent:
            # Not one evaluation has succeeded: it is not this vector's fault, and no slot is to pay for it.
            return TransientError(f"the first evaluations fail again and again; last: {reason}")
        return None if mendable else error

    def _finish_evaluation(self, number: int, attempt: int, outcome: Outcome, evaluation: Evaluation) -> None:
        loss = evaluation.loss_nats
        if not math.isfinite(loss):
            self._fail(
                number,
                attempt,
                outcome.worker,
                evaluation.seconds,
                f"the loss is {loss}, not a finite number",
            )
            return
        nll = evaluation.nll_nats(self._slots[number].nll_nats)
        state = SlotState.STOPPED if evaluation.stopped_early else SlotState.COMPLETE
        result: dict[str, Any] = {
            "losses": evaluation.losses,
            "loss_nats": loss,
            "nll_nats": nll,
            "tokens": evaluation.tokens,
            "seconds": evaluation.seconds,
            "achieved": self._shape.sparsity(evaluation.achieved),
            "worker": outcome.worker,
        }
        attrs = {"perplexity": round(perplexity(nll), 5), "nll_nats": nll}
        self._results.append((Result(number, attempt, state, **result, attrs=attrs), result))

    def _fail(self, number: int, attempt: int, worker: str, seconds: float, error: str) -> None:
        result: dict[str, Any] = {"worker": worker, "seconds": seconds, "error": error}
        self._results.append((Result(number, attempt, SlotState.FAILED, **result), result))

    def _done(self, number: int, state: SlotState, result: dict[str, Any]) -> None:
        self._refresh(number, state=state, **result)
        slot = self._slots[number]
        self._steering.finished(slot)
        if slot.origin.startswith("sampler:") and slot.losses is not None:
            self._trials.append(slot.losses)
        if self._suggester is not None:
            self._suggester.tell(number, state, self._told(slot))
        self._report(slot)

    def _told(self, slot: Slot) -> float | None:
        """What the sampler is told: of a stopped slot its estimated loss, by the losses of the space's centre.

        That vector is the same after every restart, and so is what is told.
        """
        if slot.state is not SlotState.STOPPED or slot.losses is None:
            return slot.loss_nats
        if self._reference is None:
            return slot.loss_nats
        return estimated_loss(slot.losses, self._reference)

    def _refresh(self, number: int, **changes: Any) -> None:
        self._slots[number] = dataclasses.replace(self._slots[number], **changes)

    def _report(self, current: Slot | None) -> None:
        slots = self._slots
        self._progress(
            SearchProgress(
                total=len(slots),
                complete=slots.counts[SlotState.COMPLETE],
                stopped=slots.counts[SlotState.STOPPED],
                failed=slots.counts[SlotState.FAILED],
                best=slots.best,
                current=current,
                saved=slots.saved,
                activity=self._activity(),
            )
        )

    def _activity(self) -> str:
        if self._steering.paused:
            return "paused"
        return self._descents.describe if self._descents is not None and self._descents.running else ""


def _origin(seed: Seed) -> str:
    return seed.name if seed.name.startswith(DESCENT) else f"seed:{seed.name}"


def _untouched(slot: Slot) -> bool:
    return slot.state is SlotState.WAITING and slot.sparsities is None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
