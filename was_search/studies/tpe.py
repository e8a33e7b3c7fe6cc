"""Optuna's TPE, faster in two places; the suggestions are the same bits.

Stock TPE converts the parameters of all trials into arrays at every suggestion, which costs about as much as the
densities themselves at a thousand trials of 32 parameters. A trial's parameters never change, so a row of numbers
is made once. The densities of all candidates are computed at once in arrays of candidates x trials x parameters,
which leave the processor's cache at a few thousand trials; here they go tile by tile and candidate by candidate.
Both are made of private parts of Optuna, so its minor release is pinned; ``tests/was_search/studies/test_tpe.py``
compares with the stock sampler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.probability_distributions import _BatchedTruncNormDistributions
from optuna.study import Study
from optuna.trial import FrozenTrial

from was_search.shape import FloatArray

_TILE = 512
"""Trials in a tile, so that all arrays of one tile stay in the processor's cache."""


def make_tpe(seed: int) -> TPESampler:
    """The sampler for multivariate suggestions that see running trials, random numbers from ``seed``.

    It serves one study, whose trials have their parameters from the start and keep them.
    """
    return FastTPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)


class FastTPESampler(TPESampler):
    """TPE for one study, whose trials all have their parameters from the start and keep them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._parzen_estimator_cls = _CandidateByCandidate
        self._names: tuple[str, ...] = ()
        self._rows = np.empty((0, 0))
        self._known = np.empty(0, bool)

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, npt.NDArray[Any]]:
        names = tuple(search_space)
        numbers = np.fromiter((trial.number for trial in trials), np.intp, len(trials))
        if names != self._names:
            self._names, self._rows, self._known = names, np.empty((0, len(names))), np.empty(0, bool)
        if len(numbers) and (highest := int(numbers.max())) >= len(self._known):
            self._grow(max(2 * highest, 64))
        for i in np.flatnonzero(~self._known[numbers]):
            params = self._get_params(trials[i], study)
            if not search_space.keys() <= params.keys():
                return super()._get_internal_repr(trials, search_space, study)
            row = [distribution.to_internal_repr(params[name]) for name, distribution in search_space.items()]
            self._rows[numbers[i]] = row
            self._known[numbers[i]] = True
        columns = np.ascontiguousarray(self._rows[numbers].T)
        return dict(zip(names, columns, strict=True))

    def _grow(self, capacity: int) -> None:
        rows, known = np.empty((capacity, len(self._names))), np.zeros(capacity, bool)
        rows[: len(self._known)], known[: len(self._known)] = self._rows, self._known
        self._rows, self._known = rows, known


class _CandidateByCandidate(_ParzenEstimator):
    """Optuna's densities, with the same operations in the same order, in small temporary arrays."""

    def log_pdf(self, samples_dict: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        mixture = self._mixture_distribution
        normal = [d for d in mixture.distributions if isinstance(d, _BatchedTruncNormDistributions)]
        if len(normal) < len(mixture.distributions):
            return super().log_pdf(samples_dict)
        mus = np.asarray([d.mu for d in normal]).T
        sigmas = np.asarray([d.sigma for d in normal]).T
        low = (np.asarray([d.low for d in normal]) - mus) / sigmas
        high = (np.asarray([d.high for d in normal]) - mus) / sigmas
        mass, log_sigmas = _truncnorm._log_gauss_mass(low, high), np.log(sigmas)
        nowhere = low == high
        mus, sigmas, low, high, mass, log_sigmas = (
            np.ascontiguousarray(array) for array in (mus, sigmas, low, high, mass, log_sigmas)
        )
        candidates = self._transform(samples_dict)
        total = np.empty((len(candidates), len(mus)))
        for begin in range(0, len(mus), _TILE):
            tile = slice(begin, begin + _TILE)
            terms = (mus[tile], sigmas[tile], low[tile], high[tile], mass[tile], log_sigmas[tile], nowhere[tile])
            x, density = np.empty_like(terms[0]), np.empty_like(terms[0])
            for candidate, sums in zip(candidates, total, strict=True):
                _log_densities(candidate, *terms, x=x, density=density, sums=sums[tile])
        total += np.log(mixture.weights[np.newaxis])
        highest = total.max(axis=1)
        highest[np.isneginf(highest)] = 0
        with np.errstate(divide="ignore"):
            found: npt.NDArray[Any] = np.log(np.exp(total - highest[:, None]).sum(axis=1)) + highest
        return found


def _log_densities(
    candidate: FloatArray,
    mus: FloatArray,
    sigmas: FloatArray,
    low: FloatArray,
    high: FloatArray,
    mass: FloatArray,
    log_sigmas: FloatArray,
    nowhere: npt.NDArray[np.bool_],
    *,
    x: FloatArray,
    density: FloatArray,
    sums: FloatArray,
) -> None:
    """``sums`` [n]: log densities of n truncated normals at ``candidate`` [d], summed over its d parameters.

    ``x`` and ``density`` [n, d] are overwritten.
    """
    np.divide(np.subtract(candidate, mus, out=x), sigmas, out=x)
    np.negative(np.square(x, out=density), out=density)
    density /= 2.0
    density -= _truncnorm._norm_pdf_logC
    density -= mass
    density -= log_sigmas
    outside = x < low
    outside |= x > high
    if outside.any():
        density[outside] = -np.inf
    if nowhere.any():
        density[nowhere] = np.nan
    np.sum(density, axis=-1, out=sums)
