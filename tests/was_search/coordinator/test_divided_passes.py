"""Passes that workers share end in the bits of one worker's, whoever does what, and whatever is lost on the way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.harness.pool_double import Given, PoolDouble
from was_search.coordinator import divided_passes
from was_search.coordinator.calls import Held
from was_search.coordinator.descents import DescentPlan, Descents
from was_search.coordinator.divided_passes import DividedDescent, PassesOnPool, descend_on, parts_of
from was_search.coordinator.model_calls import Descend, LearnCompensation, SlopePart
from was_search.errors import InfeasibleError, TransientError
from was_search.masks import slope
from was_search.masks.calibration import histogram_pass
from was_search.masks.compensating import CompensationOptions, CompensationState, PassesHere, learn_steps
from was_search.masks.evaluation import dense_top
from was_search.studies.origin import Origin
from was_search.studies.slots import Slot, SlotState
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions

OPTIONS = CompensationOptions(steps=7, sequences=5, scale_rate=1e-2, constant_rate=2e-2, move=8e-3)
DESCENT = DescentOptions(rounds=5)


@pytest.fixture(autouse=True)
def small_parts(masked, monkeypatch):
    """Two sequences a part."""
    monkeypatch.setattr(slope, "CPU_FLOP", 2 * 6.0 * float(masked.shape.params.sum()) * 17)


@pytest.fixture
def data(make_data, tokens):
    return make_data(tokens)


@pytest.fixture
def histograms(masked, data):
    return histogram_pass(masked, data, None)[0]


@pytest.fixture
def budget(masked):
    return SparsityBudget(masked.shape, 0.6)


START = np.full((3, 7), 0.6)


class Pool(PoolDouble):
    """Workers with one model, whose calls end in the order that ``due`` gives; every ``lose``-th is lost."""

    def __init__(self, masked, n_workers, *, last=False, lose=0):
        due = (lambda running: running[-1:]) if last else (lambda running: running[:1])
        super().__init__(self._answer, n_workers, due=due)
        self._masked, self._lose, self._numbers = masked, lose, itertools.count(1)
        self.calls: list[type] = []

    def _answer(self, given: Given):
        self.calls.append(type(given.call))
        if self._lose and next(self._numbers) % self._lose == 0:
            raise ConnectionError("gone")
        return given.call.run(self._masked)


def test_parts_are_what_one_pass_takes(masked, data):
    assert parts_of([7, 3, 9, 1, 4], masked.shape, data.protocol, gpu=False) == [[7, 3], [9, 1], [4]]
    assert parts_of([5], masked.shape, data.protocol, gpu=False) == [[5]]


@pytest.mark.parametrize(("name", "gpu"), [("CPU_FLOP", False), ("GPU_FLOP", True)])
def test_a_part_is_at_least_one_sequence_and_at_most_a_batch(masked, data, monkeypatch, name, gpu):
    for flop, size in ((0.0, 1), (1e30, data.protocol.batch_size)):
        monkeypatch.setattr(slope, name, flop)
        assert slope.sequences_together(masked.shape, data.protocol, gpu=gpu) == size


@pytest.mark.parametrize(
    ("n_workers", "gpus", "n", "flop", "worth"),
    [
        (2, 0.0, 5, 2.0, True),
        (1, 0.0, 5, 2.0, False),  # one worker
        (2, 0.0, 2, 2.0, False),  # one part
        (2, 1.0, 5, 2.0, True),
        (2, 1.0, 5, 100.0, False),  # batches of 4 sequences, which are little for a GPU
        (2, 0.0, 5, 100.0, True),
    ],
)
def test_when_a_pass_is_worth_dividing(masked, data, monkeypatch, n_workers, gpus, n, flop, worth):
    enough = flop * 6.0 * float(masked.shape.params.sum()) * 17
    monkeypatch.setattr(slope, "GPU_FLOP" if gpus else "CPU_FLOP", enough)
    monkeypatch.setattr(divided_passes, "GPU_FLOP", enough)
    pool = PoolDouble(n_workers=n_workers, gpus_per_worker=gpus)
    assert divided_passes.worth_dividing(pool, n, masked.shape, data.protocol) is worth


@pytest.mark.parametrize(("n_workers", "last", "lose"), [(1, False, 0), (2, True, 0), (3, False, 0), (8, True, 4)])
def test_a_compensation_has_the_bits_of_one_workers(masked, data, histograms, budget, n_workers, last, lose):
    top = dense_top(masked, data, 20)
    start = CompensationState.start(masked.shape, START, histograms.thresholds(START))
    shared = Held(data), Held(top)
    expected = LearnCompensation(*shared, start, budget, OPTIONS, 3, 4).run(masked)
    expected = LearnCompensation(*shared, expected, budget, OPTIONS, 3, 4).run(masked)
    passes = PassesOnPool(Pool(masked, n_workers, last=last, lose=lose), masked.shape, *shared)
    found = start
    for _ in range(2):
        found = learn_steps(passes, found, budget, OPTIONS, seed=3, steps=4)
    assert found.done == OPTIONS.steps
    for name in ("sparsities", "thresholds", "values", "moments", "direction", "kept", "losses"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_parts_add_up_to_a_pass_that_was_not_divided(masked, data, histograms, budget, monkeypatch):
    """To rounding: a whole pass adds within its batches."""
    top = dense_top(masked, data, 20)
    start = CompensationState.start(masked.shape, START, histograms.thresholds(START))
    found = learn_steps(PassesHere(masked, data, top), start, budget, OPTIONS, seed=0, steps=1)
    monkeypatch.setattr(slope, "CPU_FLOP", 1e30)
    whole = learn_steps(PassesHere(masked, data, top), start, budget, OPTIONS, seed=0, steps=1)
    np.testing.assert_allclose(found.values, whole.values, atol=1e-6)
    np.testing.assert_allclose(found.sparsities, whole.sparsities, atol=1e-6)


@pytest.mark.parametrize("masks", ["separate", "shared"])
def test_a_divided_descent_ends_where_a_whole_one_does(masked, make_data, tokens, budget, masks):
    model = type(masked).of(masked.model, "l2", masks)
    data, budget = make_data(tokens), SparsityBudget(model.shape, 0.6)
    histograms = histogram_pass(model, data, None)[0]
    arguments = Held(data), Held(histograms), START, budget, DESCENT, 7, 11
    expected = Descend(*arguments).run(model)
    divided = DividedDescent(*arguments, gpu=False)
    while divided.end is None:
        number = divided.rounds
        for part in reversed(range(divided.n_parts)):
            assert divided.take(part, divided.call(part).run(model)) is (part == 0)
        assert divided.rounds == number + 1
    np.testing.assert_array_equal(divided.end, expected)


@pytest.mark.parametrize(("n_workers", "per_round", "kind"), [(1, 7, Descend), (5, 2, Descend), (5, 7, SlopePart)])
def test_one_descent_on_all_workers(masked, data, histograms, budget, n_workers, per_round, kind):
    arguments = Held(data), Held(histograms), START, budget, DESCENT, per_round, 11
    pool = Pool(masked, n_workers, last=True, lose=4)
    found = descend_on(pool, *arguments, phase="")
    np.testing.assert_array_equal(found, Descend(*arguments).run(masked))
    assert set(pool.calls) == {kind}


def ends(masked, data, histograms, budget, pool, per_round=7):
    """The vectors that an epoch of two chains proposes, by origin; the error that ended it where there is one."""
    plan = DescentPlan(1, (0.04, 0.015), DESCENT, per_round, data)
    descents = Descents(plan, pool, Held(histograms), budget=budget, seed=2, seconds_per_token=0.0, max_attempts=3)
    seed = Slot(0, SlotState.COMPLETE, origin=str(Origin.seed("uniform")), loss_nats=3.0, sparsities=START)
    assert not descents.finished([seed])
    while descents.running:
        descents.hand_out()
        assert set(descents.in_flight) == set(pool.given)
        for outcome in pool.wait(0.0):
            assert descents.owns(outcome.ticket)
            if (error := descents.settle(outcome)) is not None:
                return error
    return {str(origin): end for origin, end in iter(descents.next_proposal, None)}


@pytest.mark.parametrize(("n_workers", "last", "lose"), [(3, False, 0), (8, True, 0), (5, True, 6), (9, False, 5)])
def test_more_workers_than_chains_share_their_rounds(masked, data, histograms, budget, n_workers, last, lose):
    few, many = Pool(masked, 2), Pool(masked, n_workers, last=last, lose=lose)
    expected = ends(masked, data, histograms, budget, few)
    found = ends(masked, data, histograms, budget, many)
    assert set(few.calls) == {Descend}
    assert set(many.calls) == {SlopePart}
    assert list(found) == list(expected) == ["descent:0:mean", "descent:0:0", "descent:0:1"]
    for origin, end in expected.items():
        np.testing.assert_array_equal(found[origin], end, err_msg=origin)


def test_chains_whose_rounds_are_one_part_stay_whole(masked, data, histograms, budget):
    pool = Pool(masked, 8)
    ends(masked, data, histograms, budget, pool, per_round=2)
    assert pool.calls == [Descend, Descend]


def test_a_part_that_every_worker_loses_ends_the_search(masked, data, histograms, budget):
    error = ends(masked, data, histograms, budget, Pool(masked, 4, lose=1))
    assert isinstance(error, TransientError)
    assert "a descent was lost" in str(error)


def test_slopes_that_are_not_finite_end_the_search(masked, data, histograms, budget, monkeypatch):
    run = SlopePart.run

    def broken(call, model):
        sums = run(call, model)
        sums.change[1, 2] = np.inf
        return sums

    monkeypatch.setattr(SlopePart, "run", broken)
    error = ends(masked, data, histograms, budget, Pool(masked, 4))
    assert isinstance(error, InfeasibleError)


def test_what_is_given_up_begins_anew(masked, data, histograms, budget):
    plan = DescentPlan(1, (0.04, 0.015), DESCENT, 7, data)
    pool = Pool(masked, 4)
    descents = Descents(plan, pool, Held(histograms), budget=budget, seed=2, seconds_per_token=0.0, max_attempts=3)
    seed = Slot(0, SlotState.COMPLETE, origin=str(Origin.seed("uniform")), loss_nats=3.0, sparsities=START)
    descents.finished([seed])
    descents.hand_out()
    descents.settle(pool.wait(0.0)[0])
    assert descents.abandon()
    pool.abandon()
    assert not descents.running
    descents.finished([seed])
    assert descents.running
    while descents.running:
        descents.hand_out()
        for outcome in pool.wait(0.0):
            assert descents.settle(outcome) is None
    found = {str(origin): end for origin, end in iter(descents.next_proposal, None)}
    for origin, end in ends(masked, data, histograms, budget, Pool(masked, 2)).items():
        np.testing.assert_array_equal(found[origin], end)
