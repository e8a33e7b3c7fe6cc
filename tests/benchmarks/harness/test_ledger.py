from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.harness.ledger import Exhausted, OutOfTime
from tests.benchmarks.bowl import N_SEQUENCES, TOKENS, L
from was_search.masks.early_stop import Cut, StopRule

UNIFORM = np.full((L, 7), 0.6)


def test_a_full_evaluation_costs_the_whole_split(ledger, bowl):
    book = ledger(2)
    score = book.evaluate(UNIFORM)
    assert (book.spent, book.n_full, book.left) == (N_SEQUENCES * TOKENS, 1, N_SEQUENCES * TOKENS)
    assert score.full and not score.stopped
    assert score.loss_nats == pytest.approx(bowl.loss(UNIFORM), abs=1e-12)


def test_what_was_seen_is_not_charged_again(ledger, bowl):
    book = ledger(1)
    first = book.evaluate(UNIFORM, 4)
    assert book.spent == 4 * TOKENS
    assert np.isnan(first.losses[4:]).all() and not first.full
    second = book.evaluate(UNIFORM, np.array([2, 3, 15]), before=first)
    assert book.spent == 5 * TOKENS
    whole = book.evaluate(UNIFORM, before=second)
    assert book.spent == N_SEQUENCES * TOKENS
    assert bowl.calls == [4, 1, 11]
    np.testing.assert_allclose(whole.losses, bowl.loss(UNIFORM) + bowl.noise, atol=1e-12)


def test_several_vectors_at_once_count_like_one_by_one(ledger, bowl):
    """Also where the budget ends among them."""
    order = np.array([3, 0, 9, 5])
    vectors = [UNIFORM, bowl.best, 0.5 * (UNIFORM + bowl.best)]
    at_once, singly = ledger(2), ledger(2)
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


def test_each_of_several_is_booked_at_its_own_tokens(ledger, bowl):
    book = ledger(3)
    book.evaluate_many([(UNIFORM, None), (bowl.best, None)], np.arange(N_SEQUENCES))
    assert [i.tokens for i in book.incumbents] == [N_SEQUENCES * TOKENS, 2 * N_SEQUENCES * TOKENS]


def test_nothing_is_done_that_the_budget_does_not_cover(ledger, bowl):
    book = ledger(1.5)
    book.evaluate(UNIFORM)
    with pytest.raises(Exhausted):
        book.evaluate(UNIFORM)
    assert book.spent == N_SEQUENCES * TOKENS
    book.evaluate(UNIFORM, N_SEQUENCES // 2)
    assert book.left == 0
    assert bowl.calls == [N_SEQUENCES, N_SEQUENCES // 2]


def test_spending_on_other_work(ledger):
    book = ledger(1)
    book.spend(100)
    assert book.left == 60
    with pytest.raises(Exhausted):
        book.spend(61)
    assert book.spent == 100
    with pytest.raises(ValueError, match="tokens: must not be negative, got -1"):
        book.spend(-1)


def test_only_full_evaluations_become_the_incumbent(ledger, bowl):
    book = ledger(5)
    book.evaluate(bowl.best, N_SEQUENCES - 1)
    assert book.at(book.spent) is None
    book.evaluate(UNIFORM)
    book.evaluate(bowl.best)
    worse = 0.5 * (UNIFORM + bowl.best)
    book.evaluate(worse)
    one = N_SEQUENCES * TOKENS
    assert book.at(2 * one - TOKENS - 1) is None
    assert book.at(2 * one - TOKENS).loss_nats == pytest.approx(bowl.loss(UNIFORM))
    assert book.at(3 * one - TOKENS).loss_nats == pytest.approx(2.0)
    np.testing.assert_array_equal(book.at(10**9).sparsities, bowl.best)


def test_early_stopping_saves_tokens(ledger, bowl):
    book = ledger(3)
    best = book.evaluate(bowl.best)
    rule = StopRule(best.losses)
    stopped = book.evaluate(UNIFORM, rule=rule)
    # All eight pairs agree: p is 2^-8, under 0.01.
    assert stopped.stopped and stopped.seen.sum() == 8
    assert book.spent == (N_SEQUENCES + 8) * TOKENS
    again = book.evaluate(bowl.best, rule=rule)
    assert again.full and not again.stopped


def test_refuses_what_is_off_the_budget(ledger):
    with pytest.raises(ValueError, match=r"sparsities: must meet the target 0\.6, off by 1e-08"):
        ledger(1).evaluate(UNIFORM + 1e-8)
    with pytest.raises(ValueError, match="off by nan"):
        ledger(1).evaluate(UNIFORM * np.nan)


def test_a_stopped_evaluation_goes_on_in_the_order_it_was_asked_for(ledger, bowl):
    book = ledger(3)
    best = book.evaluate(bowl.best)
    order = np.roll(np.arange(N_SEQUENCES), -4)
    rule = StopRule(best.losses[order], 0.0, (Cut(8, 0.0),))
    stopped = book.evaluate(UNIFORM, order, rule=rule)
    assert stopped.stopped
    np.testing.assert_array_equal(np.flatnonzero(stopped.seen), np.arange(4, 12))
    whole = book.evaluate(UNIFORM, order, before=stopped)
    assert whole.full
    assert book.spent == 2 * book.tokens_per_evaluation


def test_a_loss_that_is_not_finite_is_never_the_incumbent(ledger, bowl):
    bowl.noise[3] = np.nan
    book = ledger(1)
    assert book.evaluate(UNIFORM).loss_nats == float("inf")
    assert book.at(book.spent) is None


def test_the_deadline_drops_the_run(ledger):
    with pytest.raises(OutOfTime):
        ledger(1, deadline=time.time() - 1).evaluate(UNIFORM)
