"""Confidence intervals and a test for paired per-sequence losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from was_search.shape import FloatArray


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences with its 95 % interval, nats per token."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {(self.high - self.low) / 2:.4f}"


def paired_interval(losses: FloatArray, baseline: FloatArray, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of ``losses - baseline`` [n] over the same sequences; negative is better.

    Sequences are taken as independent; neighbouring windows of one text are only nearly so.
    """
    from scipy.stats import t

    if losses.shape != baseline.shape or losses.ndim != 1 or len(losses) < 2:
        raise ValueError(f"losses: two equal runs of at least 2 are needed, got {losses.shape} and {baseline.shape}")
    difference = losses - baseline
    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / float(np.sqrt(len(difference)))
    half = float(t.ppf(0.5 + confidence / 2, len(difference) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def paired_p_value(losses: FloatArray, baseline: FloatArray) -> float:
    """Two-sided p-value of Student's paired t-test that the mean of ``losses - baseline`` [n] is zero.

    It is under 0.05 just where :func:`paired_interval` leaves zero out; 1 for equal losses.
    """
    from scipy.stats import t

    difference = losses - baseline
    if not difference.any():
        return 1.0
    with np.errstate(divide="ignore"):  # differences that are all the same are no chance: p is 0
        statistic = difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))
    return float(2.0 * t.sf(abs(statistic), len(difference) - 1))
