from __future__ import annotations

import numpy as np
import pytest

from was_search.masks.early_stop import (
    MIN_SEQUENCES,
    MIN_TRIALS,
    RECENT,
    Cut,
    StopRule,
    estimated_loss,
    is_worse,
    rung_cuts,
)

RNG = np.random.default_rng(0)
INCUMBENT = RNG.normal(3.0, 0.5, 64)


def stops(losses: np.ndarray, incumbent: np.ndarray, batch: int = 4, significance: float = 0.01) -> bool:
    """A whole evaluation: the test after every batch but the last."""
    return any(is_worse(losses[:n], incumbent, significance) for n in range(batch, len(losses), batch))


def test_signed_ranks_by_brute_force():
    """All signs of eight pairs are equally likely: the p-value by counting the 256 of them."""
    difference = np.array([0.5, -0.1, 0.7, 0.2, 0.9, 0.4, 0.6, 0.3])
    ranks = np.argsort(np.argsort(np.abs(difference))) + 1
    positive = ranks[difference > 0].sum()
    signs = (np.arange(256)[:, None] >> np.arange(8)) & 1
    p = np.mean(signs @ ranks >= positive)
    incumbent = np.full(8, 3.0)
    assert is_worse(incumbent + difference, incumbent, significance=p * 1.001)
    assert not is_worse(incumbent + difference, incumbent, significance=p * 0.999)


def test_false_positives_over_the_whole_way():
    """Equal candidates, 14 correlated looks of 1 % each: about 4 % are stopped; 8 % would be wrong."""
    rng = np.random.default_rng(1)
    stopped = sum(stops(INCUMBENT + rng.normal(0, 0.05, 64), INCUMBENT) for _ in range(300))
    assert stopped / 300 < 0.08  # three standard errors above 0.045


def test_a_worse_candidate_is_stopped():
    rng = np.random.default_rng(2)
    worse = [stops(INCUMBENT + rng.normal(0.05, 0.05, 64), INCUMBENT) for _ in range(50)]
    assert np.mean(worse) > 0.95


def test_a_better_candidate_is_not():
    rng = np.random.default_rng(3)
    assert not any(stops(INCUMBENT + rng.normal(-0.05, 0.05, 64), INCUMBENT) for _ in range(50))


def test_eight_pairs_suffice_and_seven_do_not():
    worse = INCUMBENT + 0.1 * np.arange(1, 65)
    assert not is_worse(worse[: MIN_SEQUENCES - 1], INCUMBENT)
    assert is_worse(worse[:MIN_SEQUENCES], INCUMBENT)


def test_equal_losses_and_ties():
    assert not is_worse(INCUMBENT.copy(), INCUMBENT)
    tied = INCUMBENT.copy()
    tied[:3] += 0.5  # three differences, the others zero
    assert not is_worse(tied, INCUMBENT)
    assert is_worse(INCUMBENT + 0.25, INCUMBENT)  # all differences tied


def test_a_worse_median_with_a_better_mean_goes_on():
    losses = INCUMBENT + 0.01
    losses[0] -= 10.0
    assert not is_worse(losses, INCUMBENT)


def test_longer_than_the_incumbent():
    assert not is_worse(INCUMBENT + 1.0, INCUMBENT[:32])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(bad):
    losses = INCUMBENT[:16].copy()
    losses[3] = bad
    assert is_worse(losses, INCUMBENT)


def test_an_incumbent_that_is_not_finite_stops_nobody():
    incumbent = INCUMBENT.copy()
    incumbent[2] = np.nan
    assert not is_worse(INCUMBENT + 1.0, incumbent)


def test_a_cut_holds_back_from_its_number_of_sequences_on():
    rule = StopRule(INCUMBENT, 0.0, (Cut(8, 0.1), Cut(16, -0.05)))
    for difference, ends in ((0.2, 8), (0.09, 16), (-0.04, 16), (-0.06, 64)):
        stopped = [n for n in range(1, 64) if rule.stops(INCUMBENT[:n] + difference)]
        assert (stopped[0] if stopped else 64) == ends


def test_a_cut_judges_by_its_own_sequences():
    """Batches may end after it: what came after those sequences does not count."""
    losses = INCUMBENT.copy()
    losses[8:12] -= 10.0
    losses[:8] += 0.2
    assert StopRule(INCUMBENT, 0.0, (Cut(8, 0.1),)).stops(losses[:12])


def test_a_finished_evaluation_is_never_stopped():
    assert not StopRule(INCUMBENT, 0.01, (Cut(8, 0.1),)).stops(INCUMBENT + 1.0)


def test_losses_that_are_not_finite_pass_no_rung():
    losses = INCUMBENT[:8].copy()
    losses[3] = np.nan
    assert StopRule(INCUMBENT, 0.0, (Cut(8, 0.1),)).stops(losses)


def test_a_rule_without_a_test_and_cuts_stops_nothing():
    assert not any(StopRule(INCUMBENT, 0.0).stops(INCUMBENT[:n] + 1.0) for n in range(64))


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_cuts_let_the_best_share_pass(keep):
    differences = np.random.default_rng(4).permutation(np.linspace(-0.1, 0.3, 20))
    trials = [INCUMBENT[:8] + d if d > 0.2 else INCUMBENT[:16] + d for d in differences]
    first, second = rung_cuts(trials, INCUMBENT, keep)
    assert (first.sequences, second.sequences) == (8, 16)
    assert np.mean(differences <= first.highest) == pytest.approx(keep)
    # Of those that reached the second rung.
    there = differences[differences <= 0.2]
    assert np.mean(there <= second.highest) == pytest.approx(keep, abs=1 / len(there))


def test_cuts_compare_differences_not_losses():
    """Sequences that are hard for all make no trial worse."""
    hard = INCUMBENT + np.arange(64)
    assert rung_cuts([hard + 0.1] * 4, hard, 0.5)[0].highest == pytest.approx(0.1)


def test_few_trials_make_no_cuts_and_old_ones_are_forgotten():
    assert rung_cuts([INCUMBENT] * (MIN_TRIALS - 1), INCUMBENT, 0.5) == ()
    trials = [INCUMBENT + 5.0] * 100 + [INCUMBENT + 0.1] * RECENT
    assert [cut.highest for cut in rung_cuts(trials, INCUMBENT, 0.5)] == pytest.approx([0.1] * 3)
    assert rung_cuts(trials, INCUMBENT, 1.0) == ()


def test_few_sequences_have_few_rungs():
    assert [cut.sequences for cut in rung_cuts([INCUMBENT[:2]] * 4, INCUMBENT[:2], 0.5)] == [1, 1, 1]
    assert rung_cuts([INCUMBENT[:1]] * 4, INCUMBENT[:1], 0.5) == ()


def test_the_estimate_is_exact_for_a_common_difference():
    assert estimated_loss(INCUMBENT[:5] + 0.25, INCUMBENT) == pytest.approx(INCUMBENT.mean() + 0.25)
    assert estimated_loss(INCUMBENT + 0.25, INCUMBENT) == pytest.approx(INCUMBENT.mean() + 0.25)


def test_the_estimate_has_less_noise_than_the_mean():
    rng = np.random.default_rng(5)
    vectors = INCUMBENT + 0.1 + rng.normal(0, 0.05, (200, 64))
    truth = vectors.mean(axis=1)
    estimates = np.array([estimated_loss(v[:8], INCUMBENT) for v in vectors])
    assert np.std(estimates - truth) < 0.2 * np.std(INCUMBENT) / np.sqrt(8)
    assert abs(np.mean(estimates - truth)) < 0.01
