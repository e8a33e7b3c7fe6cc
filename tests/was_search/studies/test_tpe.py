"""The sampler that remembers rows against the stock one: the same suggestions, to the last bit."""

from __future__ import annotations

import warnings
from collections import deque

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from was_search.studies.tpe import make_tpe

SPACE = {f"level_{i}": FloatDistribution(0.5 - 0.01 * i, 0.6) for i in range(7)}


def stock(seed: int) -> TPESampler:
    return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)


def suggestions(sampler: TPESampler, *, finished: int, in_flight: int, asked: int) -> list[dict[str, float]]:
    """Of a study with earlier trials, ties at the bounds and failures among them; trials end in another order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=sampler)
    rng = np.random.default_rng(1)
    for i in range(finished):
        params = {n: float(np.clip(rng.normal(0.55, 0.04), d.low, d.high)) for n, d in SPACE.items()}
        failed = i % 7 == 3
        study.add_trial(
            create_trial(
                params=params,
                distributions=SPACE,
                value=None if failed else round(sum(params.values()), 2),  # rounded: values tie too
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
            )
        )
    running: deque[optuna.Trial] = deque()
    found = []
    for i in range(asked):
        trial = study.ask(SPACE)
        found.append(trial.params)
        running.append(trial)
        if len(running) > in_flight:
            running.rotate(i % 3)
            ended = running.popleft()
            state = TrialState.FAIL if i % 5 == 4 else TrialState.COMPLETE
            study.tell(ended, None if state is TrialState.FAIL else sum(ended.params.values()), state=state)
    return found


@pytest.mark.parametrize(("finished", "in_flight"), [(0, 3), (30, 1), (150, 40)])
def test_suggestions_are_the_stock_samplers(finished: int, in_flight: int) -> None:
    """From nothing (drawn parameter by parameter), with one in flight, with many."""
    kept = suggestions(make_tpe(5), finished=finished, in_flight=in_flight, asked=60)
    assert kept == suggestions(stock(5), finished=finished, in_flight=in_flight, asked=60)
    assert len({tuple(params.values()) for params in kept}) == 60
