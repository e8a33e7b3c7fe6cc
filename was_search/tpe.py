"""Optuna's TPE, faster in two places; the suggestions are the same bits.

Stock TPE converts the parameters of all trials into arrays at every suggestion, which costs about as much as the
densities themselves at a thousand trials of 32 parameters. A trial's parameters never change, so a row of numbers
is made once. The densities of all candidates are computed at once in arrays of candidates x trials x parameters,
which leave the processor's cache at a few thousand trials; here they go tile by tile and candidate by candidate.
Where this Optuna is not one that the test against the stock sampler has seen, the stock one is used.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.samplers import TPESampler

VERIFIED = ("5.0",)
"""Releases of Optuna whose TPE gives the same suggestions; ``tests/search/test_tpe.py`` compares them."""


def make_tpe(seed: int) -> TPESampler:
    """The sampler for multivariate suggestions that see running trials, random numbers from ``seed``.

    It serves one study, whose trials have their parameters from the start and keep them.
    """
    options: dict[str, Any] = {"seed": seed, "multivariate": True, "constant_liar": True, "n_startup_trials": 0}
    if ".".join(optuna.__version__.split(".")[:2]) not in VERIFIED:
        return TPESampler(**options)
    from was_search.fast_tpe import FastTPESampler  # made of private parts of Optuna

    return FastTPESampler(**options)
