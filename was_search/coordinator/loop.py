"""The coordinator's loop: hand slots out, commit results. One per study; owns no truth."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from was_search.coordinator.calls import Work
from was_search.coordinator.chooser import Chooser
from was_search.coordinator.contracts import Outcome, RunControl, SlotStore, WorkerPool
from was_search.coordinator.descents import Descents
from was_search.coordinator.durable import durable
from was_search.coordinator.lost_calls import LostCalls
from was_search.coordinator.model_calls import Evaluate
from was_search.coordinator.options import SearchOptions
from was_search.coordinator.search_progress import SearchProgress
from was_search.coordinator.slot_table import SlotTable
from was_search.coordinator.steering import Steering
from was_search.errors import InfeasibleError, TransientError
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import Histograms
from was_search.process.logs import bound_fields
from was_search.shape import ModelShape
from was_search.studies.control import LAST_SLOT, Control
from was_search.studies.hand_outs import HandOut, Result
from was_search.studies.slots import Slot, SlotState
from was_search.texts.protocol import Evaluation, TokenSet, perplexity
from was_search.vectors.seeds import Seed

_TOGETHER_SECONDS = 0.05
"""Time in which chosen vectors are committed together: a commit costs more than a further trial in it."""

_HAND_OUT_SECONDS = 1.0
"""Time of handing out after which results that have come meanwhile are looked at."""

_EVALUATION = Work(Evaluate.words)


class SearchLoop:
    """Runs a study to its last slot, or until a rule or somebody ends it.

    Seeds come first and are evaluated in full, then come the descents' vectors, then a sampler's: see
    :class:`was_search.coordinator.chooser.Chooser`.

    Args:
        store: the study's slots, guarded by the coordinator's lock.
        pool: its workers evaluate.
        data: tokens of the search split.
        histograms: at the operating point.
        shape: the model's.
        seeds: in the order of the first slots.
        options: how it runs.
        top: the dense model's top predictions on ``data``: the fitness is the divergence from them; None: the NLL.
        drain: once set, nothing more is handed out and the loop ends with the calls in flight.
        run_control: where others ask for a pause, another number of workers and so on; None where nobody does.
        progress: called after every finished slot.
        clock: seconds, for limits and for how often it is asked.

    Attributes:
        ending: how the run ended.
    """

    def __init__(
        self,
        store: SlotStore,
        pool: WorkerPool,
        data: TokenSet,
        histograms: Histograms,
        *,
        shape: ModelShape,
        seeds: list[Seed],
        options: SearchOptions,
        top: DenseTop | None = None,
        drain: threading.Event,
        run_control: RunControl | None = None,
        progress: Callable[[SearchProgress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = durable(store)
        self._pool = pool
        self._data = pool.share(data)
        self._top = None if top is None else pool.share(top)
        self._histograms = pool.share(histograms)
        self._shape = shape
        self._options = options
        self._progress = progress
        self._slots = SlotTable(store.slots())
        self._results: list[tuple[Result, dict[str, Any]]] = []
        self._steering = Steering(
            run_control,
            pool,
            limits=options.limits,
            elsewhere=options.elsewhere,
            drain=drain,
            slots=list(self._slots.values()),
            clock=clock,
        )
        self._pool_shown = pool.state
        self.ending = LAST_SLOT
        self._flight: dict[int, tuple[int, int, float]] = {}
        self._lost = LostCalls(pool, options.max_attempts)
        self._descents: Descents | None = None
        if options.descents is not None and options.descents.epochs:
            self._descents = Descents(
                options.descents,
                pool,
                self._histograms,
                budget=options.budget,
                seed=options.seed,
                # An evaluation may take trial_timeout; a backward pass keeps fewer tokens a second.
                seconds_per_token=2.0 * options.trial_timeout / data.protocol.predicted_tokens,
                max_attempts=options.max_attempts,
            )
        self._chooser = Chooser(
            self._slots, shape=shape, seeds=seeds, options=options, descents=self._descents, clock=clock
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
                    more = self._hand_out() or self._chooser.choose_ahead(len(self._flight) + self._pool.n_idle)
                outcomes = self._pool.wait(0.0 if more else 0.5)
                self._look_for_hung()
                if errors := self._settle_all(outcomes):
                    raise errors[0]
        except Exception as error:
            self._put_back(f"the search stopped: {_first_line(error)}")
            raise
        if self._descents is not None and self._descents.abandon():
            self._pool.abandon()  # nothing else is in flight; what comes next would wait for them
        self._steering.beat()
        slots = self._store.slots()
        if self._steering.ending is not None and not all(slot.state.finished for slot in slots):
            self.ending = self._steering.ending
        return slots

    def _goes_on(self) -> bool:
        """Do what is asked of the run; returns whether the loop has another turn."""
        was_paused = self._steering.paused
        self._steering.activity = self._descending
        control = self._steering.steer()
        changed = (control is not None and self._fit(control)) or was_paused != self._steering.paused
        self._pool.need(self._slots.n_unfinished)
        self._chooser.fit(self._pool.n_loaded)
        if changed or self._pool.state != self._pool_shown:
            self._report(None)
        if self._steering.cancelled:
            self._pool.abandon()
            self._put_back("cancelled")
            return False
        return bool(self._flight) or (self._steering.ending is None and self._unfinished())

    def _look_for_hung(self) -> None:
        """Find calls without a reply that take too long.

        Right after replies were taken: one that came while the loop waited for the database is no call that hangs.
        """
        descents = {} if self._descents is None else self._descents.in_flight
        calls = dict.fromkeys(self._flight, _EVALUATION) | descents
        self._pool.health.look(calls, by_measure=not self._options.trial_timeout)

    def _put_back(self, reason: str) -> None:
        """Requeue what is in flight."""
        for number, _, _ in self._flight.values():
            self._store.requeue(number, reason)
        self._flight.clear()
        self._chooser.forget_ahead()

    def _fit(self, control: Control) -> bool:
        """Take in slots that were added, and remove those that are no longer wanted; returns whether any."""
        before = len(self._slots)
        for number in range(before, control.n_slots):
            self._slots[number] = Slot(number, SlotState.WAITING)
        trials = control.overrides.trials
        if trials is not None and trials < len(self._slots):
            ahead = self._chooser.ahead
            used = [s.number + 1 for s in self._slots.values() if not (_untouched(s) or s.number in ahead)]
            if max(trials, *used, 0) < len(self._slots):
                self._keep(self._store.shrink(trials), ahead)
        return len(self._slots) != before

    def _keep(self, n_slots: int, ahead: set[int]) -> None:
        """Forget the slots from ``n_slots`` on; the vectors of those in ``ahead`` are written down nowhere yet."""
        kept = [slot for slot in self._slots.values() if slot.number < n_slots]
        self._slots.reload(s if s.number not in ahead else Slot(s.number, SlotState.WAITING) for s in kept)
        for slot in kept:
            if slot.number in ahead:
                self._slots[slot.number] = slot

    def _unfinished(self) -> bool:
        if not self._slots.unfinished:
            # Someone may have extended the study while it ran.
            self._slots.reload(self._store.slots())
        return self._slots.unfinished

    def _hand_out(self) -> bool:
        """Give idle workers something to do; returns True where time was up before all of them had work."""
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
            attempts = self._store.begin(together, self._options.longest_evaluation_seconds)
            for hand_out, attempt in zip(together, attempts, strict=True):
                self._send(hand_out, attempt)
        return False

    def _choose_together(self) -> list[HandOut]:
        """Slots for idle workers in the order that the pool takes them, as many as are chosen in a moment."""
        end = time.monotonic() + _TOGETHER_SECONDS
        chosen: list[HandOut] = []
        for worker in self._pool.idle_names:
            if (found := self._chooser.next()) is None:
                break
            number, proposal = found
            chosen.append(HandOut(number, worker, proposal))
            if time.monotonic() > end:
                break
        return chosen

    def _send(self, hand_out: HandOut, attempt: int) -> None:
        slot = self._slots[hand_out.number]
        assert slot.sparsities is not None
        call = Evaluate(self._data, self._histograms, slot.sparsities, self._chooser.stop_rule(slot), self._top)
        ticket = self._pool.submit(
            call,
            deadline_seconds=self._options.longest_evaluation_seconds,
            about=self._about(hand_out, attempt),
        )
        self._flight[ticket] = (hand_out.number, attempt, time.monotonic())
        self._refresh(hand_out.number, state=SlotState.RUNNING, attempt=attempt, worker=hand_out.worker)

    def _about(self, hand_out: HandOut, attempt: int) -> dict[str, Any]:
        """Ids of the evaluation for the worker's log."""
        ids = {"slot": hand_out.number, "attempt": attempt, "trial": self._store.trial_of(hand_out.number)}
        return {**bound_fields(), **ids, "worker": hand_out.worker}

    def _settle_all(self, outcomes: list[Outcome]) -> list[BaseException]:
        """Write outcomes down, results together before anything is put back; returns errors that end the search."""
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
            self._store.finish_all([result for result, _ in results])
        for result, changes in results:
            self._done(result.number, result.state, changes)

    def _settle(self, outcome: Outcome) -> BaseException | None:
        """Write an outcome down; returns an error that ends the search, its slot put back."""
        if self._descents is not None and self._descents.owns(outcome.ticket):
            return self._descents.settle(outcome)
        if outcome.ticket not in self._flight:
            return None  # the call was left in flight by a phase that raised
        number, attempt, started = self._flight.pop(outcome.ticket)
        error = outcome.error
        if error is None:
            seconds = time.monotonic() - started
            self._chooser.evaluated(seconds)
            self._pool.health.answered(outcome.index, seconds, _EVALUATION._replace(tokens=outcome.value.tokens))
            self._finish_evaluation(number, attempt, outcome, outcome.value)
            return None
        seconds = time.monotonic() - started
        if isinstance(error, InfeasibleError):
            self._fail(number, attempt, outcome.worker, seconds, _first_line(error))
            return None
        reason = f"{type(error).__name__} on {outcome.worker}: {_first_line(error)}"
        mendable = outcome.lost or isinstance(error, TransientError)
        spent = mendable and self._lost.lost(number, outcome, f"{type(error).__name__}: {_first_line(error)}")
        if spent and self._slots.best is not None:
            times = self._lost.count(number)
            self._fail(number, attempt, outcome.worker, seconds, f"lost {times} times; last: {reason}")
            return None
        self._store.requeue(number, reason)
        self._refresh(number, state=SlotState.WAITING)
        if spent:
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
        nll = evaluation.nll_nats()
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
        # The dashboard draws any attribute of all trials; a mean over the first sequences is none of the whole text.
        attrs = {} if evaluation.stopped_early else {"perplexity": round(perplexity(nll), 5), "nll_nats": nll}
        self._results.append((Result(number, attempt, state, **result, attrs=attrs), result))

    def _fail(self, number: int, attempt: int, worker: str, seconds: float, error: str) -> None:
        result: dict[str, Any] = {"worker": worker, "seconds": seconds, "error": error}
        self._results.append((Result(number, attempt, SlotState.FAILED, **result), result))

    def _done(self, number: int, state: SlotState, result: dict[str, Any]) -> None:
        self._refresh(number, state=state, **result)
        slot = self._slots[number]
        self._steering.finished(slot)
        self._chooser.finished(slot)
        self._report(slot)

    def _refresh(self, number: int, **changes: Any) -> None:
        self._slots[number] = dataclasses.replace(self._slots[number], **changes)

    def _report(self, current: Slot | None) -> None:
        slots = self._slots
        self._pool_shown = self._pool.state
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
                pool=self._pool_shown,
            )
        )

    def _activity(self) -> str:
        if self._steering.paused:
            return "paused"
        return self._descending

    @property
    def _descending(self) -> str:
        return self._descents.describe if self._descents is not None and self._descents.running else ""


def _untouched(slot: Slot) -> bool:
    return slot.state is SlotState.WAITING and slot.sparsities is None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
