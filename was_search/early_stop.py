"""Stop an evaluation whose sequences show that the incumbent is better: a paired Wilcoxon signed-rank test."""

from __future__ import annotations

import warnings

import numpy as np

from was_search.shape import FloatArray

MIN_SEQUENCES = 8
"""Fewer pairs than this say too little: with n of them that all agree, p is 2^-n (0.008 at 7, 0.004 at 8)."""


def is_worse(losses: FloatArray, incumbent: FloatArray, significance: float = 0.01) -> bool:
    """Whether ``losses`` [n] are worse than the incumbent's first n, at ``significance`` (one-sided).

    Sequences come in a fixed shuffled order, the same for every trial, so the pairs are exchangeable. The test
    is repeated after every batch, so the chance of stopping an equal candidate somewhere on the way is above
    ``significance``; the default is low for that reason. Also asks that the mean is worse. Losses that are not
    finite are worse than any.
    """
    from scipy.stats import wilcoxon

    n = len(losses)
    if n < MIN_SEQUENCES or n > len(incumbent):
        return False
    difference = losses - incumbent[:n]
    if not np.all(np.isfinite(difference)):
        return not np.all(np.isfinite(losses))
    if difference.mean() <= 0.0 or not np.any(difference):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties and zeros: the normal approximation is meant
        return bool(wilcoxon(difference, alternative="greater").pvalue < significance)
