"""Stop an evaluation before its last sequence: racing against the incumbent, and rungs among trials.

Racing: a paired Wilcoxon signed-rank test says that the incumbent is better. Rungs (successive halving over
sequences, Li et al., arXiv 1810.05934): of the trials that reached a number of sequences only the best share goes on. A
worker decides both by itself, from a :class:`StopRule` that is sent along with the vector.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from was_search.shape import FloatArray

MIN_SEQUENCES = 8
"""Least number of pairs for a test: with n pairs that all agree, p is 2^-n (0.008 at 7, 0.004 at 8)."""

RUNGS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the sequences at which trials are compared with each other."""

MIN_TRIALS = 4
"""Number of trials that must have reached a rung before it stops any."""

RECENT = 32
"""Number of trials, the last ones to reach a rung, that it compares with: a search improves as it goes on."""


@dataclass(frozen=True)
class Cut:
    """At ``sequences`` sequences an evaluation stops if it is worse than the incumbent by more than ``highest``.

    ``highest`` is a mean difference in nats per token, negative where only better ones are to go on.
    """

    sequences: int
    highest: float


@dataclass(frozen=True)
class StopRule:
    """When an evaluation stops; pure data, so that a repeated evaluation stops at the same place.

    Attributes:
        incumbent: losses of the best vector, of all sequences in the evaluation's order, float64 [n].
        significance: level of the test against it; 0 makes no test.
        cuts: the rungs' cuts, in rising order.
    """

    incumbent: FloatArray
    significance: float = 0.01
    cuts: tuple[Cut, ...] = ()

    def stops(self, losses: FloatArray) -> bool:
        """Whether an evaluation that has ``losses`` [m], m <= n, is to end here."""
        if len(losses) >= len(self.incumbent):
            return False
        for cut in self.cuts:
            if len(losses) >= cut.sequences:
                first = losses[: cut.sequences] - self.incumbent[: cut.sequences]
                if not first.mean() <= cut.highest:
                    return True
        return self.significance > 0.0 and is_worse(losses, self.incumbent, self.significance)


def is_worse(losses: FloatArray, incumbent: FloatArray, significance: float = 0.01) -> bool:
    """Whether ``losses`` [n] are worse than the incumbent's first n, at ``significance`` (one-sided).

    Sequences come in a fixed shuffled order, the same for every trial, so the pairs are exchangeable. The test
    is repeated after every batch, so the chance of stopping an equal candidate somewhere on the way is above
    ``significance``. Also asks that the mean is worse. Losses that are not finite are worse than any.
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
        warnings.simplefilter("ignore")  # ties and zeros: the normal approximation is wanted
        return bool(wilcoxon(difference, alternative="greater").pvalue < significance)


def rung_cuts(trials: Sequence[FloatArray], incumbent: FloatArray, keep: float) -> tuple[Cut, ...]:
    """Cuts that let the best ``keep`` of trials pass each rung.

    Args:
        trials: losses of earlier trials in the order of their end, each of the sequences that it saw, float64 [m].
        incumbent: losses of the best vector, of all sequences, [n]; what is compared is the difference to it.
        keep: share of the trials that reached a rung which would pass it, in (0, 1]; 1 makes no cuts.
    """
    if keep >= 1.0:
        return ()
    cuts = []
    for share in RUNGS:
        sequences = max(1, math.ceil(share * len(incumbent)))
        there = list(islice((losses for losses in reversed(trials) if len(losses) >= sequences), RECENT))
        if len(there) >= MIN_TRIALS and sequences < len(incumbent):
            differences = [float((losses[:sequences] - incumbent[:sequences]).mean()) for losses in there]
            cuts.append(Cut(sequences, float(np.quantile(differences, keep))))
    return tuple(cuts)


def estimated_loss(losses: FloatArray, reference: FloatArray) -> float:
    """Loss of a vector over all sequences, from those that it saw: the reference's mean plus the mean difference.

    Vectors near each other lose on the same sequences, so the difference of few sequences says more than their
    mean: the reference is a control variate.

    Args:
        losses: its losses on the first m sequences, [m].
        reference: losses of a vector near it on all sequences, [n].
    """
    return float(reference.mean() + (losses - reference[: len(losses)]).mean())
