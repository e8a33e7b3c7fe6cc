from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from was_search.masks.intervals import Interval, paired_interval, paired_p_value


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_against_scipy(confidence):
    rng = np.random.default_rng(0)
    baseline = rng.normal(3, 0.5, 21)
    losses = baseline + rng.normal(0.02, 0.05, 21)
    found = paired_interval(losses, baseline, confidence)
    expected = ttest_rel(losses, baseline).confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.mean == pytest.approx(np.mean(losses - baseline))
    assert paired_p_value(losses, baseline) == pytest.approx(ttest_rel(losses, baseline).pvalue, rel=1e-12)


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        found = paired_interval(rng.normal(0.1, 1, 8), np.zeros(8))
        hits += found.low <= 0.1 <= found.high
    assert 930 <= hits <= 970  # three standard errors of 1,000 draws


def test_equal_losses():
    found = paired_interval(np.ones(4), np.ones(4))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert paired_p_value(np.ones(4), np.ones(4)) == 1.0
    assert paired_p_value(np.ones(4), np.zeros(4)) == 0.0  # a difference that never varies


def test_text():
    assert str(Interval(-0.05, -0.1, 0.0)) == "-0.0500 ± 0.0500"  # the interval is symmetric


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4), (0, 0)])
def test_refuses_unequal_or_short_runs(n, m):
    with pytest.raises(ValueError, match=rf"two equal runs of at least 2 are needed, got \({n},\) and \({m},\)"):
        paired_interval(np.zeros(n), np.zeros(m))
