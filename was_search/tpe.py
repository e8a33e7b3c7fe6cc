"""Optuna's TPE with what it reads from every trial kept between suggestions; the suggestions are the same bits.

Stock TPE converts the parameters of all trials into arrays at every suggestion, which costs about as much as the
densities themselves at a thousand trials of 32 parameters. A trial's parameters never change, so a row of numbers
is made once. Where this Optuna is not one that the test against the stock sampler has seen, the stock one is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

VERIFIED = ("5.0",)
"""Releases of Optuna whose TPE gives the same suggestions; ``tests/search/test_tpe.py`` compares them."""


def make_tpe(seed: int) -> TPESampler:
    """The sampler for ``multivariate`` suggestions that see running trials, random numbers from ``seed``."""
    known = ".".join(optuna.__version__.split(".")[:2]) in VERIFIED
    kind = _RememberingSampler if known else TPESampler
    return kind(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)


class _RememberingSampler(TPESampler):
    """For one study, whose trials all have their parameters from the start and keep them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
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
