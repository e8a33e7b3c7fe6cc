"""Samplers: Optuna's, by name, on an in-memory study that is fed again from finished slots.

Nothing here knows of Postgres or Ray. Sampler state is never persisted: a new :class:`Suggester` told of the
same slots goes on from there.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Final, Literal, get_args

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from was_search.errors import ConfigError
from was_search.studies.origin import OriginKind
from was_search.studies.slots import Slot, SlotState, best_slot
from was_search.studies.tpe import make_tpe
from was_search.vectors.space import Space

SamplerName = Literal["tpe", "cmaes", "gp", "qmc", "random", "was-monotone"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
MONOTONE: Final = "was-monotone"
"""The one that is TPE in a space of its own, :class:`was_search.vectors.space.MonotoneSpace`, and knows no seeds."""

# Every evaluation is chosen by us and logged by us; Optuna's own lines would double them.
logging.getLogger("optuna").setLevel(logging.WARNING)


def make_sampler(
    name: SamplerName, space: Space, seed: int, sigma: float, start: dict[str, float] | None = None
) -> BaseSampler:
    """The Optuna sampler called ``name`` for ``space``.

    ``sigma`` is the step of CMA-ES, as a share of each parameter's range; ``start`` is where it begins (None: the
    space's centre).

    Raises:
        ConfigError: an unknown name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)  # Optuna 6 removes x0 and sigma0 of CMA-ES
        match "tpe" if name == MONOTONE else name:
            case "tpe":
                return make_tpe(seed)
            case "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed,
                    x0=dict(start or space.centre),
                    sigma0=sigma,
                    n_startup_trials=0,
                    warn_independent_sampling=False,  # the first trial of a study without others
                )
            case "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=True)
            case "qmc":
                return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_asynchronous_seeding=False)
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
    raise ConfigError(f"sampler: must be one of {', '.join(SAMPLERS)}, got {name!r}")


_STEP = 1 / 6
"""Standard deviation of the first steps around the centre, as a share of each parameter's own range."""


class Suggester:
    """Suggests parameters for slots and learns from finished ones. Not thread-safe.

    The first ``n_startup`` suggestions of the model-based samplers are Gaussian steps from the space's centre
    (uniform points in a box of many dimensions are nearly all worse than its centre).

    Args:
        name: the sampler.
        space: its parameters.
        seed: decides the sampler's numbers and the startup steps.
        n_startup: startup suggestions; 0 for samplers that need none.
    """

    def __init__(self, name: SamplerName, space: Space, *, seed: int, n_startup: int = 8) -> None:
        self._space = space
        self._seed = seed
        self._name: SamplerName = name
        self._study = optuna.create_study(direction="minimize", sampler=make_sampler(name, space, seed, _STEP))
        self._startup_left = n_startup if name in ("tpe", "gp", MONOTONE) else 0
        self._trials: dict[int, int] = {}
        self._distributions = _Shared(space.distributions)

    def restore(self, slots: list[Slot]) -> None:
        """Tell the sampler of slots that an earlier run proposed: finished ones and those still to be evaluated.

        What was suggested once is not suggested again: random numbers go on from a new seed, QMC at the next
        point of its sequence. CMA-ES, whose state is not kept, starts again at the best slot.
        """
        suggested, observed = 0, set()
        for slot in slots:
            if slot.params is None or slot.params.keys() != self._distributions.keys():
                continue
            if slot.source.kind is OriginKind.SAMPLER:
                self._startup_left = max(0, self._startup_left - 1)
                suggested += 1
            if self.observe(slot.number, slot.params):
                observed.add(slot.number)
            if slot.state.finished:
                self.tell(slot.number, slot.state, slot.loss_nats)
        if suggested:
            known = [slot for slot in slots if slot.number in observed]
            self._go_on(suggested, best_slot(known))

    def _go_on(self, suggested: int, best: Slot | None) -> None:
        sampler = self._study.sampler
        if isinstance(sampler, optuna.samplers.QMCSampler):
            for _ in range(suggested):
                sampler._find_sample_id(self._study, self._space.distributions)
            return
        seed = int(np.random.SeedSequence([self._seed, suggested]).generate_state(1)[0])
        start = None if best is None else best.params
        self._study.sampler = make_sampler(self._name, self._space, seed, _STEP, start)

    def observe(self, number: int, params: dict[str, float]) -> bool:
        """Add a slot whose parameters were not suggested here, as running; False if it is left out as out of range."""
        distributions = self._distributions
        if any(not distributions[name]._contains(param) for name, param in params.items()):
            return False
        trial = FrozenTrial(
            number=-1,
            trial_id=-1,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=None,
            datetime_complete=None,
            params=_Shared(params),
            distributions=distributions,
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        trial_id = self._study._storage.create_new_trial(self._study._study_id, template_trial=trial)
        self._trials[number] = self._study._storage.get_trial_number_from_id(trial_id)
        return True

    def suggest(self, number: int) -> dict[str, float]:
        """Parameters for slot ``number``."""
        if self._startup_left > 0:
            self._startup_left -= 1
            params = self._step(number)
            self.observe(number, params)
            return params
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self._study.ask(self._distributions)
        self._trials[number] = trial.number
        return {name: float(value) for name, value in trial.params.items()}

    def tell(self, number: int, state: SlotState, loss_nats: float | None) -> None:
        """Tell the outcome of slot ``number``; slots unknown to the sampler (seeds of other tables) are passed over.

        A stopped slot counts like a complete one, so its ``loss_nats`` should be an estimate of the loss over all
        sequences (:func:`was_search.masks.early_stop.estimated_loss`): as pruned ones CMA-ES would pass it over.
        """
        trial_number = self._trials.pop(number, None)
        if trial_number is None:
            return
        # Study.tell copies the whole trial twice, which is most of the time of resuming, and adds nothing here.
        storage = self._study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, trial_number)
        if state in (SlotState.COMPLETE, SlotState.STOPPED) and loss_nats is not None:
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(loss_nats)])
        else:
            storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _step(self, number: int) -> dict[str, float]:
        rng = np.random.default_rng([self._seed, number])
        params = {}
        centre = self._space.centre
        for name, distribution in self._space.distributions.items():
            low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
            value = centre[name] + _STEP * (high - low) * rng.standard_normal()
            params[name] = float(np.clip(value, low, high))
        return params


class _Shared(dict[str, Any]):
    """A dictionary that nobody changes, so that the in-memory storage's deep copies may share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self
