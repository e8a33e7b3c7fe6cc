from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.harness.ledger import Exhausted, OutOfTime
from tests.benchmarks.bowl import N_SEQUENCES, TOKENS, L
from was_search.masks.early_stop import Cut, StopRule

UNIFORM = np.full((L, 7), 0.6)


def test_a_full_evaluation_costs_the_whole_split(new_ledger, bowl):
    ledger = new_ledger(2)
    score = ledger.evaluate(UNIFORM)
    assert (ledger.spent, ledger.n_full, ledger.left) == (N_SEQUENCES * TOKENS, 1, N_SEQUENCES * TOKENS)
    assert score.full and not score.stopped
    assert score.loss_nats == pytest.approx(bowl.loss(UNIFORM), abs=1e-12)


def test_what_was_seen_is_not_charged_again(new_ledger, bowl):
    ledger = new_ledger(1)
    first = ledger.evaluate(UNIFORM, 4)
    assert ledger.spent == 4 * TOKENS
    assert np.isnan(first.losses[4:]).all() and not first.full
    second = ledger.evaluate(UNIFORM, np.array([2, 3, 15]), before=first)
    assert ledger.spent == 5 * TOKENS
    whole = ledger.evaluate(UNIFORM, before=second)
    assert ledger.spent == N_SEQUENCES * TOKENS
    assert bowl.calls == [4, 1, 11]
    np.testing.assert_allclose(whole.losses, bowl.loss(UNIFORM) + bowl.noise, atol=1e-12)


def test_several_vectors_at_once_count_like_one_by_one(new_ledger, bowl):
    """Also where the budget ends among them."""
    order = np.array([3, 0, 9, 5])
    vectors = [UNIFORM, bowl.best, 0.5 * (UNIFORM + bowl.best)]
    at_once, singly = new_ledger(2), new_ledger(2)
    first = at_once.evaluate_many([(vector, None) for vector in vectors], order)
    each = [singly.evaluate(vector, order) for vector in vectors]
    for found, expected in zip(first, each, strict=True):
        np.testing.assert_array_equal(found.losses, expected.losses)
        np.testing.assert_array_equal(found.seen, expected.seen)
    every = np.arange(N_SEQUENCES)
    with pytest.raises(Exhausted):
        at_once.evaluate_many(list(zip(vectors, first, strict=True)), every)
    singly.evaluate(vectors[0], before=each[0])
    with pytest.raises(Exhausted):
        singly.evaluate(vectors[1], before=each[1])
    assert at_once.spent == singly.spent == (3 * 4 + 12) * TOKENS
    assert at_once.at(at_once.spent).loss_nats == pytest.approx(bowl.loss(UNIFORM), abs=1e-12)
    with pytest.raises(ValueError, match="off by"):
        at_once.evaluate_many([(UNIFORM + 1e-8, None)], order)


def test_each_of_several_is_booked_at_its_own_tokens(new_ledger, bowl):
    ledger = new_ledger(3)
    ledger.evaluate_many([(UNIFORM, None), (bowl.best, None)], np.arange(N_SEQUENCES))
    assert [i.tokens for i in ledger.incumbents] == [N_SEQUENCES * TOKENS, 2 * N_SEQUENCES * TOKENS]


def test_nothing_is_done_that_the_budget_does_not_cover(new_ledger, bowl):
    ledger = new_ledger(1.5)
    ledger.evaluate(UNIFORM)
    with pytest.raises(Exhausted):
        ledger.evaluate(UNIFORM)
    assert ledger.spent == N_SEQUENCES * TOKENS
    ledger.evaluate(UNIFORM, N_SEQUENCES // 2)
    assert ledger.left == 0
    assert bowl.calls == [N_SEQUENCES, N_SEQUENCES // 2]


def test_spending_on_other_work(new_ledger):
    ledger = new_ledger(1)
    ledger.spend(100)
    assert ledger.left == 60
    with pytest.raises(Exhausted):
        ledger.spend(61)
    assert ledger.spent == 100
    with pytest.raises(ValueError, match="tokens: must not be negative, got -1"):
        ledger.spend(-1)


def test_only_full_evaluations_become_the_incumbent(new_ledger, bowl):
    ledger = new_ledger(5)
    ledger.evaluate(bowl.best, N_SEQUENCES - 1)
    assert ledger.at(ledger.spent) is None
    ledger.evaluate(UNIFORM)
    ledger.evaluate(bowl.best)
    worse = 0.5 * (UNIFORM + bowl.best)
    ledger.evaluate(worse)
    one = N_SEQUENCES * TOKENS
    assert ledger.at(2 * one - TOKENS - 1) is None
    assert ledger.at(2 * one - TOKENS).loss_nats == pytest.approx(bowl.loss(UNIFORM))
    assert ledger.at(3 * one - TOKENS).loss_nats == pytest.approx(2.0)
    np.testing.assert_array_equal(ledger.at(10**9).sparsities, bowl.best)


def test_early_stopping_saves_tokens(new_ledger, bowl):
    ledger = new_ledger(3)
    best = ledger.evaluate(bowl.best)
    rule = StopRule(best.losses)
    stopped = ledger.evaluate(UNIFORM, rule=rule)
    # All eight pairs agree: p is 2^-8, under 0.01.
    assert stopped.stopped and stopped.seen.sum() == 8
    assert ledger.spent == (N_SEQUENCES + 8) * TOKENS
    again = ledger.evaluate(bowl.best, rule=rule)
    assert again.full and not again.stopped


def test_refuses_what_is_off_the_budget(new_ledger):
    with pytest.raises(ValueError, match=r"sparsities: must meet the target 0\.6, off by 1e-08"):
        new_ledger(1).evaluate(UNIFORM + 1e-8)
    with pytest.raises(ValueError, match="off by nan"):
        new_ledger(1).evaluate(UNIFORM * np.nan)


def test_a_stopped_evaluation_goes_on_in_the_order_it_was_asked_for(new_ledger, bowl):
    ledger = new_ledger(3)
    best = ledger.evaluate(bowl.best)
    order = np.roll(np.arange(N_SEQUENCES), -4)
    rule = StopRule(best.losses[order], 0.0, (Cut(8, 0.0),))
    stopped = ledger.evaluate(UNIFORM, order, rule=rule)
    assert stopped.stopped
    np.testing.assert_array_equal(np.flatnonzero(stopped.seen), np.arange(4, 12))
    whole = ledger.evaluate(UNIFORM, order, before=stopped)
    assert whole.full
    assert ledger.spent == 2 * ledger.tokens_per_evaluation


def test_a_loss_that_is_not_finite_is_never_the_incumbent(new_ledger, bowl):
    bowl.noise[3] = np.nan
    ledger = new_ledger(1)
    assert ledger.evaluate(UNIFORM).loss_nats == float("inf")
    assert ledger.at(ledger.spent) is None


def test_the_deadline_drops_the_run(new_ledger):
    with pytest.raises(OutOfTime):
        new_ledger(1, deadline=time.time() - 1).evaluate(UNIFORM)
