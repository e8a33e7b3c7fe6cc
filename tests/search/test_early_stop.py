from __future__ import annotations

import numpy as np
import pytest

from was_search.early_stop import MIN_SEQUENCES, is_worse

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
