"""The loop without Ray or Postgres: a book in memory and a pool that answers as it is told."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray

from tests.workers.steady_pool import SteadyPool
from was_search.early_stop import StopRule
from was_search.errors import InfeasibleError, ModelError, TransientError
from was_search.hand_out import HandOut, Result
from was_search.protocol import Evaluation
from was_search.sampling import Suggester
from was_search.seeds import baseline_seeds, fisher_seed
from was_search.shape import ModelShape
from was_search.slots import Slot, SlotState
from was_search.table import Table, uniform_table
from was_workers.pool import Outcome
from was_workers.search import SearchLoop, SearchOptions
from was_workers.slot_book import durable

SHAPE = ModelShape(((8, 8, 8, 8, 8, 8, 16),) * 3, ((8, 4, 4, 8, 16, 16, 8),) * 3)
GRID = np.linspace(0.0, 0.95, 20)
PRICES = np.tile(GRID**2, (3, 7, 1)) * np.arange(1, 22).reshape(3, 7, 1)


class Book:
    """Slots in memory, with storage's rules: a slot finishes once, by the attempt that runs."""

    def __init__(self, n: int) -> None:
        self.rows = [Slot(i, SlotState.WAITING) for i in range(n)]
        self.finishes: list[int] = []
        self.attrs: dict[int, dict[str, Any]] = {}

    def slots(self) -> list[Slot]:
        return list(self.rows)

    def _set(self, number: int, **changes: Any) -> None:
        self.rows[number] = dataclasses.replace(self.rows[number], **changes)

    def propose(self, number, *, origin, params, distributions, levels, sparsities, attrs) -> None:
        assert self.rows[number].levels is None
        assert all(distributions[name]._contains(value) for name, value in params.items())
        self._set(number, origin=origin, params=dict(params), levels=levels, sparsities=sparsities)

    def start(self, number: int, worker: str, lease_seconds: float) -> int:
        assert self.rows[number].state is SlotState.WAITING
        self._set(number, state=SlotState.RUNNING, attempt=self.rows[number].attempt + 1, worker=worker)
        return self.rows[number].attempt

    def trial_of(self, number: int) -> int | None:
        return None

    def begin(self, hand_outs: list[HandOut], lease_seconds: float) -> list[int]:
        for hand_out in hand_outs:
            if hand_out.proposal is not None:
                self.propose(hand_out.number, **vars(hand_out.proposal))
        return [self.start(hand_out.number, hand_out.worker, lease_seconds) for hand_out in hand_outs]

    def finish_all(self, results: list[Result]) -> list[bool]:
        return [self.finish(**vars(result)) for result in results]

    def requeue(self, number: int, reason: str) -> None:
        self._set(number, state=SlotState.WAITING, error=reason)

    def finish(self, number: int, attempt: int, state: SlotState, *, attrs=None, **result: Any) -> bool:
        assert self.rows[number].state is SlotState.RUNNING
        assert self.rows[number].attempt == attempt
        self.finishes.append(number)
        self.attrs[number] = dict(attrs or {})
        self._set(number, state=state, **result)
        return True


class Pool(SteadyPool):
    """Two workers; ``answer(call, sparsities, rule)`` gives a value, or raises what the call ends with."""

    def __init__(self, answer: Callable[[int, np.ndarray, Any], Evaluation]) -> None:
        self.answer = answer
        self.calls: list[tuple[np.ndarray, Any]] = []
        self._running: deque[tuple[int, tuple[Any, ...]]] = deque()

    @property
    def n_idle(self) -> int:
        return 2 - len(self._running)

    @property
    def idle_names(self) -> list[str]:
        return ["worker"] * self.n_idle

    def submit(self, method: str, *args: Any, deadline_seconds: float) -> int:
        assert method == "evaluate"
        self.calls.append((args[3], args[4]))
        self._running.append((len(self.calls) - 1, args))
        return len(self.calls) - 1

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        if not self._running:
            return []
        ticket, args = self._running.popleft()
        try:
            return [Outcome(ticket, "worker", value=self.answer(ticket, args[3], args[4]))]
        except ConnectionError as error:
            return [Outcome(ticket, "worker", error=error, lost=True)]
        except Exception as error:
            return [Outcome(ticket, "worker", error=error)]


def evaluation(sparsities: np.ndarray, loss: float | None = None) -> Evaluation:
    """A bowl around 0.6: the uniform vector is best."""
    mean = float(np.square(sparsities - 0.6).sum()) + 2.0 if loss is None else loss
    return Evaluation(np.full(4, mean), 400, 0.01, False, sparsities)


NOISE = np.array([0.3, -0.2, 0.1, 0.4, -0.3, -0.1, -0.4, 0.2])
"""Of eight sequences, the same for every vector; its mean is zero."""


def bowl(sparsities: np.ndarray) -> float:
    return float(np.square(sparsities - 0.6).sum()) + 2.0


def in_steps(sparsities: np.ndarray, rule: StopRule | None) -> Evaluation:
    """The bowl on eight sequences in batches of one, as an evaluator goes through them."""
    losses = bowl(sparsities) + NOISE
    seen = next((n for n in range(1, 8) if rule is not None and rule.stops(losses[:n])), 8)
    return Evaluation(losses[:seen], 100 * seen, 0.01, seen < 8, sparsities)


def divergence(sparsities: np.ndarray) -> Evaluation:
    """Best where the NLL is worst."""
    found = evaluation(sparsities)
    return dataclasses.replace(found, losses=10.0 - found.losses, nats=found.losses)


def seeds():
    greedy = Table("greedy", uniform_table(SHAPE).blocks)
    return [*baseline_seeds(SHAPE, 0.6, greedy), fisher_seed(PRICES, GRID, SHAPE, 0.6)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "put", lambda value: value)

    def start(book: Book, answer, *, drain: threading.Event | None = None, progress=None, **options: Any) -> list[Slot]:
        wanted = {
            "target": 0.6,
            "sampler": "tpe",
            "radius": 0.1,
            "seed": 0,
            "early_stopping": True,
            "significance": 0.1,
            "rung_keep": 0.5,
            "trial_timeout": 60.0,
            "max_attempts": 3,
            **options,
        }
        loop = SearchLoop(
            book,
            Pool(answer),
            "tokens",
            "histograms",
            "key",
            shape=SHAPE,
            seeds=seeds(),
            options=SearchOptions(**wanted),
            drain=drain or threading.Event(),
            progress=progress or (lambda _: None),
        )
        return loop.run()

    return start


@pytest.mark.parametrize("space", ["temperature", "additive", "full"])
def test_every_space_is_sampled_on_the_budget(run, space) -> None:
    """Trials lie on the budget, carry the space's parameters, and start near the best seed (here the uniform one)."""
    book = Book(14)
    slots = run(book, lambda call, sparsities, _: evaluation(sparsities), space=space, radius=0.02)
    sampled = [slot for slot in slots if slot.origin.startswith("sampler:")]
    assert len(sampled) == 11
    names = set(sampled[0].params)
    assert len(names) == {"temperature": 4, "additive": 10, "full": 21}[space]
    for slot in sampled:
        assert set(slot.params) == names
        assert SHAPE.sparsity(slot.sparsities) == pytest.approx(0.6, abs=1e-12)
        np.testing.assert_allclose(slot.levels, SHAPE.levels(slot.sparsities), atol=1e-12)
        # Offsets of block and kind, and the shift that brings the sum back onto the budget.
        assert np.abs(slot.sparsities - 0.6).max() < 4 * 0.02 + 1e-9


def test_every_slot_finishes_once_on_the_budget(run) -> None:
    book = Book(20)
    slots = run(book, lambda _, s, incumbent: evaluation(s))
    assert sorted(book.finishes) == list(range(20))
    assert [s.origin for s in slots[:3]] == ["seed:uniform", "seed:greedy-uniform", "seed:fisher"]
    assert all(s.origin == "sampler:tpe" for s in slots[3:])
    for slot in slots:
        # exact by projection: float64 rounding only
        assert SHAPE.sparsity(slot.sparsities) == pytest.approx(0.6, abs=1e-12)


def test_the_loss_is_the_fitness_and_perplexity_is_of_the_nll(run) -> None:
    book = Book(12)
    rules = []

    def answer(call, s, rule):
        rules.append(rule)
        return divergence(s)

    slots = run(book, answer)
    for slot in slots:
        assert slot.loss_nats == pytest.approx(10.0 - slot.nll_nats)
        assert book.attrs[slot.number] == {
            "perplexity": pytest.approx(np.exp(slot.nll_nats), abs=1e-5), "nll_nats": slot.nll_nats,
        }  # fmt: skip
    # the incumbent is the best by divergence, and its losses are divergences
    seeds_best = min(s.loss_nats for s in slots[:3])
    assert rules[3].incumbent.mean() == pytest.approx(seeds_best)
    assert rules[3].incumbent.mean() > max(s.loss_nats for s in slots) - 10


def test_the_nll_of_an_nll_search_is_its_loss(run) -> None:
    slots = run(Book(6), lambda _, s, __: evaluation(s))
    assert [s.nll_nats for s in slots] == [s.loss_nats for s in slots]


def test_nan_fails_its_slot_and_the_search_goes_on(run) -> None:
    book = Book(10)
    slots = run(book, lambda call, s, _: evaluation(s, float("nan") if call == 5 else None))
    failed = [s for s in slots if s.state is SlotState.FAILED]
    assert len(failed) == 1
    assert "the loss is nan" in failed[0].error
    assert sum(s.state is SlotState.COMPLETE for s in slots) == 9


def test_infeasible_fails_its_slot(run) -> None:
    def answer(call, s, _):
        if call == 4:
            raise InfeasibleError("scores are not finite")
        return evaluation(s)

    slots = run(Book(8), answer)
    assert [s.error for s in slots if s.state is SlotState.FAILED] == ["scores are not finite"]


def test_a_lost_call_is_repeated_with_the_same_vector(run) -> None:
    seen: dict[int, np.ndarray] = {}

    def answer(call, s, _):
        seen[call] = s
        if call == 4:
            raise ConnectionError("the worker died")
        return evaluation(s)

    book = Book(8)
    slots = run(book, answer)
    assert all(s.state is SlotState.COMPLETE for s in slots)
    again = [s for s in slots if s.attempt == 2]
    assert len(again) == 1
    np.testing.assert_array_equal(seen[4], again[0].sparsities)
    assert len(seen) == 9


@pytest.mark.parametrize("error", [ConnectionError("died"), TransientError("GPU out of memory")])
def test_a_vector_that_always_loses_its_worker_fails_after_the_cap(run, error) -> None:
    bad: list[np.ndarray] = []

    def answer(call, s, _):
        if call == 3 or any(np.array_equal(s, b) for b in bad):
            bad.append(s)
            raise error
        return evaluation(s)

    slots = run(Book(6), answer, max_attempts=3)
    failed = [s for s in slots if s.state is SlotState.FAILED]
    assert len(bad) == 3
    assert len(failed) == 1
    assert failed[0].error.startswith("lost 3 times; last:")


def test_an_error_that_repeating_cannot_mend_stops_and_consumes_nothing(run) -> None:
    def answer(call, s, _):
        if call == 4:
            raise ModelError("the checkpoint is gone")
        return evaluation(s)

    book = Book(8)
    with pytest.raises(ModelError, match="the checkpoint is gone"):
        run(book, answer)
    assert {s.state for s in book.slots()} == {SlotState.COMPLETE, SlotState.WAITING}
    slots = run(book, lambda _, s, __: evaluation(s))
    assert all(s.state is SlotState.COMPLETE for s in slots)
    assert sorted(book.finishes) == list(range(8))


def test_while_nothing_has_succeeded_no_slot_pays_for_lost_calls(run) -> None:
    def answer(call, s, _):
        raise TransientError("GPU out of memory; use a smaller --batch-size")

    book = Book(8)
    with pytest.raises(TransientError, match=r"fail again and again.*smaller --batch-size"):
        run(book, answer)
    assert {s.state for s in book.slots()} == {SlotState.WAITING}
    assert all(s.state is SlotState.COMPLETE for s in run(book, lambda _, s, __: evaluation(s)))


def test_hand_outs_of_earlier_runs_are_no_losses(run) -> None:
    book = Book(6)
    with pytest.raises(ModelError):
        run(book, lambda call, s, _: (_ for _ in ()).throw(ModelError("stop")) if call == 4 else evaluation(s))
    book.rows = [dataclasses.replace(s, attempt=7) if s.state is SlotState.WAITING else s for s in book.rows]
    lost = []

    def lose_once(call, s, _):
        if not lost:
            lost.append(call)
            raise ConnectionError("died")
        return evaluation(s)

    assert all(s.state is SlotState.COMPLETE for s in run(book, lose_once, max_attempts=3))


def test_a_study_extended_while_it_runs_is_run_to_its_new_end(run) -> None:
    book = Book(5)

    def extend(progress) -> None:
        if progress.finished == 4 and len(book.rows) == 5:
            book.rows.extend(Slot(i, SlotState.WAITING) for i in (5, 6))

    slots = run(book, lambda _, s, __: evaluation(s), progress=extend)
    assert len(slots) == 7
    assert all(s.state is SlotState.COMPLETE for s in slots)


def test_drain_ends_with_the_calls_in_flight(run) -> None:
    drain = threading.Event()
    book = Book(30)
    slots = run(book, lambda _, s, __: evaluation(s), drain=drain, progress=lambda p: p.finished >= 7 and drain.set())
    assert 7 <= sum(s.state.finished for s in slots) <= 9
    assert not any(s.state is SlotState.RUNNING for s in slots)
    before = {s.number: s for s in slots if s.state.finished}
    after = run(book, lambda _, s, __: evaluation(s))
    assert all(s.state.finished for s in after)
    assert all(after[number] == slot or after[number].number == number for number, slot in before.items())
    assert sorted(book.finishes) == list(range(30))


def test_fewer_trials_than_seeds_keep_the_best_seeds(run) -> None:
    book = Book(1)
    assert run(book, lambda _, s, __: evaluation(s))[0].origin == "seed:fisher"
    book.rows.extend(Slot(i, SlotState.WAITING) for i in range(1, 5))
    origins = [s.origin for s in run(book, lambda _, s, __: evaluation(s))]
    assert sorted(origins[:3]) == ["seed:fisher", "seed:greedy-uniform", "seed:uniform"]
    assert origins[3:] == ["sampler:tpe"] * 2


def test_seeds_are_evaluated_in_full_and_before_the_first_proposal(run) -> None:
    rules = []

    def answer(call, s, rule):
        rules.append(rule)
        return evaluation(s)

    run(Book(8), answer)
    assert all(rule is None for rule in rules[:3])
    assert all(rule.significance == 0.1 for rule in rules[3:])


def test_without_early_stopping_every_trial_is_evaluated_in_full(run) -> None:
    rules = []
    run(Book(8), lambda _, s, rule: (rules.append(rule), evaluation(s))[1], early_stopping=False)
    assert rules == [None] * 8


def test_rungs_compare_with_the_trials_before(run) -> None:
    """Losses of eight sequences: a trial that is stopped by its rule has seen fewer."""
    rules: list[Any] = []

    def answer(call, s, rule):
        rules.append(rule)
        return in_steps(s, rule)

    book = Book(60)
    slots = run(book, answer, significance=1e-9, sampler="random")
    assert [rule.cuts for rule in rules[3:7]] == [()] * 4  # two workers: four trials have ended at the seventh
    assert [cut.sequences for cut in rules[-1].cuts] == [1, 2, 4]
    seen = [len(slot.losses) for slot in slots[3:]]
    assert {1, 2, 4, 8} >= set(seen)
    assert 0.3 < np.mean(np.array(seen[10:]) == 1) < 0.7
    assert np.sum(seen) < 0.5 * 8 * len(seen)
    best = min((s for s in slots if s.state is SlotState.COMPLETE), key=lambda s: s.loss_nats)
    # What is stopped cannot be best, and what is best was evaluated on every sequence.
    assert len(best.losses) == 8


def test_a_restarted_search_stops_by_the_same_rungs_and_tells_the_same(run, monkeypatch) -> None:
    told: list[dict[int, float]] = []
    ordinary = Suggester.tell

    def tell(self, number, state, loss_nats):
        told[-1][number] = loss_nats
        ordinary(self, number, state, loss_nats)

    monkeypatch.setattr(Suggester, "tell", tell)
    rules: dict[int, Any] = {}

    def answer(call, s, rule):
        rules[call] = rule
        return in_steps(s, rule)

    book = Book(40)
    told.append({})
    run(book, answer, sampler="random")
    last = rules[39]
    book.rows.append(Slot(40, SlotState.WAITING))
    told.append({})
    rules.clear()
    run(book, answer, sampler="random")
    assert len(rules) == 1  # the slot that was added
    assert {cut.sequences for cut in rules[0].cuts} == {cut.sequences for cut in last.cuts}
    stopped = [s.number for s in book.slots() if s.state is SlotState.STOPPED]
    assert stopped
    # What a stopped trial is told as is the centre's loss and the difference on what both saw.
    for number in stopped:
        assert told[0].get(number, told[1][number]) == told[1][number]
        assert told[1][number] == pytest.approx(bowl(book.slots()[number].sparsities), abs=1e-9)


def test_was_monotone_levels_rise_with_depth(run) -> None:
    slots = run(Book(12), lambda _, s, __: evaluation(s), sampler="was-monotone")
    for slot in slots[3:]:
        assert np.all(np.diff(slot.levels) >= -1e-12)


def test_durable_repeats_transient_errors_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    calls: list[str] = []

    class Flaky(Book):
        def requeue(self, number: int, reason: str) -> None:
            calls.append(reason)
            if len(calls) < 4:
                raise TransientError("the database restarts")
            if reason == "bad":
                raise ModelError("no")

    book = durable(Flaky(1))
    book.requeue(0, "x")
    assert calls == ["x"] * 4
    with pytest.raises(ModelError):
        book.requeue(0, "bad")
    assert calls == ["x"] * 4 + ["bad"]


class ManyWorkers(Pool):
    """Sixteen workers; all that run end together at every fourth look."""

    looks = 0

    @property
    def n_idle(self) -> int:
        return 16 - len(self._running)

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        self.looks += 1
        if self.looks % 4:
            return []
        return [outcome for _ in range(len(self._running)) for outcome in super(ManyWorkers, self).wait(0.0)]


def test_a_large_pool_gets_vectors_that_were_chosen_ahead(run, monkeypatch) -> None:
    """Chosen while all workers are busy, written down when handed out, and each slot finishes once all the same."""
    monkeypatch.setattr("tests.workers.test_search_loop.Pool", ManyWorkers)
    order: list[str] = []
    suggest, begins = Suggester.suggest, Book.begin

    def watched(self, number):
        order.append("choose")
        return suggest(self, number)

    def begin(self, hand_outs, lease_seconds):
        order.extend(["hand out"] * len(hand_outs))
        return begins(self, hand_outs, lease_seconds)

    monkeypatch.setattr(Suggester, "suggest", watched)
    monkeypatch.setattr(Book, "begin", begin)
    book = Book(120)
    run(book, lambda _, s, __: evaluation(s))
    assert sorted(book.finishes) == list(range(120))
    ahead = np.cumsum([1 if step == "choose" else -1 for step in order[3:]])
    assert ahead.max() >= 1
    assert ahead[-1] == 0  # none was chosen for nothing


def test_a_drain_forgets_what_was_chosen_ahead(run, monkeypatch) -> None:
    monkeypatch.setattr("tests.workers.test_search_loop.Pool", ManyWorkers)
    drain = threading.Event()
    book = Book(120)
    run(book, lambda _, s, __: evaluation(s), drain=drain, progress=lambda p: p.finished < 60 or drain.set())
    left = [slot for slot in book.slots() if slot.state is SlotState.WAITING]
    assert left
    assert all(slot.sparsities is None for slot in left)
    assert all(slot.state is SlotState.COMPLETE for slot in run(book, lambda _, s, __: evaluation(s)))
    assert sorted(book.finishes) == list(range(120))


def test_results_that_come_together_are_booked_together(run, monkeypatch) -> None:
    """Results before errors: a slot that was lost too often fails only because another one has succeeded."""
    monkeypatch.setattr("tests.workers.test_search_loop.Pool", ManyWorkers)
    sizes: list[int] = []
    finish_all = Book.finish_all
    monkeypatch.setattr(
        Book, "finish_all", lambda self, results: sizes.append(len(results)) or finish_all(self, results)
    )
    book = Book(80)
    slots = run(book, lambda call, s, _: evaluation(s, float("nan") if call % 9 == 8 else None))
    assert max(sizes) > 8
    assert sum(sizes) == 80
    assert {s.state for s in slots} == {SlotState.COMPLETE, SlotState.FAILED}
