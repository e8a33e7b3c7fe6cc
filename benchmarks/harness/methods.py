"""The methods that are compared, and the spaces that they search. Further ones are added with :func:`register`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import optuna

from benchmarks.harness.baselines import EvolutionSettings, RampSettings, evolve, linear_ramp
from benchmarks.harness.ledger import Exhausted, Ledger, Score
from was_search.errors import ConfigError
from was_search.masks.compensating import CompensationOptions
from was_search.shape import FloatArray, ModelShape
from was_search.studies.fitness import FitnessName
from was_search.studies.sampling import MONOTONE, SamplerName, Suggester
from was_search.studies.slots import SlotState
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import HIGHEST_DESCENDED, DescentOptions, chain_seed, chain_steps
from was_search.vectors.seeds import Seed
from was_search.vectors.space import HIGHEST_SAMPLED, SPACES, MonotoneSpace, Space, make_space


@dataclass(frozen=True)
class Task:
    """The task of a method: what it is given besides its ledger.

    Attributes:
        shape: the model's.
        target: the budget of sparsity.
        seeds: uniform, greedy-uniform and Fisher-priced, with their tables.
        space: the space's name, "-" for methods that have none.
        radius: radius of the space.
        seed: decides all random numbers.
        engine: the model at hand, :class:`benchmarks.harness.problem.Engine`; for methods that do more than evaluate.
        histograms: those that thresholds are read from, for such methods.
    """

    shape: ModelShape
    target: float
    seeds: list[Seed]
    space: str = "-"
    radius: float = 0.05
    seed: int = 0
    engine: Any = None
    histograms: Any = None

    @property
    def budget(self) -> SparsityBudget:
        return SparsityBudget(self.shape, self.target)

    def seed_called(self, name: str) -> Seed:
        return next(seed for seed in self.seeds if seed.name == name)

    def space_around(self, seed: Seed) -> Space:
        return make_space(self.space, seed, self.budget, self.radius)  # type: ignore[arg-type]


Run = Callable[[Task, Ledger], None]
"""A method's function, which drives the ledger until it raises ``Exhausted``, or returns earlier."""


@dataclass(frozen=True)
class Method:
    """One way to choose a vector.

    Attributes:
        name: as on the command line.
        run: drives a ledger (:data:`Run`); everything random follows from ``task.seed``.
        spaces: names of spaces that it can search; ("-",) if it has none.
        settings: its settings, written into every row.
        most_evaluations: greatest budget that it is run to.
        seconds: its own time for one evaluation, roughly, at a hundred parameters: decides the order of jobs.
        random: whether the seed changes anything; else one seed is run.
        fitness: fitness that its ledger's losses are of. For ``kl`` the dense model's top costs one evaluation.
        compensation: how one is learned for its last vector, with tokens of its own; None: none is.
    """

    name: str
    run: Run
    spaces: tuple[str, ...] = SPACES
    settings: dict[str, Any] = field(default_factory=dict)
    most_evaluations: float = float("inf")
    seconds: float = 0.0
    random: bool = True
    fitness: FitnessName = "nll"
    compensation: CompensationOptions | None = None


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make ``method`` known to the command line.

    Raises:
        ConfigError: the name is taken.
    """
    if method.name in METHODS:
        raise ConfigError(f"method: {method.name!r} is registered twice")
    METHODS[method.name] = method
    return method


def run_method(method: Method, task: Task, ledger: Ledger) -> None:
    """Run ``method`` to its end or to the ledger's."""
    try:
        if method.fitness == "kl":
            ledger.spend(ledger.tokens_per_evaluation)
        method.run(task, ledger)
    except Exhausted:
        return


def start(task: Task, ledger: Ledger) -> tuple[list[Score], int]:
    """Evaluate all seeds; returns their scores and the index of the best. Every search but the baselines starts so."""
    scores = [ledger.evaluate(seed.sparsities) for seed in task.seeds]
    return scores, int(np.argmin([score.loss_nats for score in scores]))


def _one_vector(name: str) -> Run:
    def run(task: Task, ledger: Ledger) -> None:
        ledger.evaluate(task.seed_called(name).sparsities)

    return run


def _ramp(task: Task, ledger: Ledger) -> None:
    linear_ramp(ledger, task.shape, task.seed_called("greedy-uniform").table, task.target)


def _evolution(task: Task, ledger: Ledger) -> None:
    scores, best = start(task, ledger)
    seed = task.seeds[best]
    rng = np.random.default_rng(task.seed)
    if task.space == "full":
        shape, weights = seed.sparsities.shape, task.shape.params.ravel().astype(np.float64)

        def projections(units: FloatArray) -> FloatArray:
            return units.reshape(shape)

        evolve(
            ledger,
            scores[best],
            seed.sparsities.ravel(),
            weights,
            np.full(weights.shape, HIGHEST_SAMPLED),
            projections,
            rng,
        )
    else:
        weights = task.shape.block_params.astype(np.float64)
        evolve(ledger, scores[best], seed.levels, weights, seed.table.max_levels, seed.table.sparsities, rng)


SamplerMaker = Callable[[int], optuna.samplers.BaseSampler]


def _sampler(name: SamplerName, make: SamplerMaker | None = None) -> Run:
    """The sampler called ``name`` as in production, or Optuna's own that ``make`` builds from a seed."""

    def run(task: Task, ledger: Ledger) -> None:
        scores: list[Score] = []
        if name == MONOTONE:
            # The published method knows no seeds.
            space: Space = MonotoneSpace(task.budget, task.seed_called("greedy-uniform").table)
        else:
            scores, centre = start(task, ledger)
            space = task.space_around(task.seeds[centre])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            suggester = Suggester("random" if make else name, space, seed=task.seed)
            if make:
                suggester._study.sampler = make(task.seed)
        for number, (seed, score) in enumerate(zip(task.seeds, scores, strict=bool(scores))):
            params = space.locate(seed)
            if params is not None:
                suggester.observe(number, params)
                suggester.tell(number, SlotState.COMPLETE, score.loss_nats)
        for number in count(len(task.seeds)):
            params = suggester.suggest(number)
            score = ledger.evaluate(space.sparsities(params))
            suggester.tell(number, _state(score), score.loss_nats)

    return run


EPOCHS, CHAINS, PER_ROUND, KL_TOP_K = 2, 2, 24, 64
CHAIN = DescentOptions(rounds=24)
"""A chain's options as in ``was_search.service.settings``, which needs more packages than a GPU machine may have."""


@dataclass(frozen=True)
class Descents:
    """A search's descents: each epoch goes from the best vector so far, with shorter steps than the one before.

    Attributes:
        steps: first step of each chain in the first epoch.
        epochs: number of epochs.
        decay: an epoch's steps, as a share of the last one's.
        options: all options of a chain but its step.
        half_way: evaluate the point between start and mean of the ends as well.
        per_round: sequences whose slopes make one step.
    """

    steps: tuple[float, ...] = chain_steps(CHAINS)
    epochs: int = EPOCHS
    decay: float = 0.5
    options: DescentOptions = CHAIN
    half_way: bool = False
    per_round: int = PER_ROUND

    def settings(self) -> dict[str, Any]:
        """The settings that rows record."""
        own = {
            "epochs": self.epochs,
            "chains": len(self.steps),
            "per_round": self.per_round,
            **vars(self.options),
        }
        own["step"] = list(self.steps)
        unusual = {"decay": self.decay, "half_way": self.half_way}
        return own | {name: value for name, value in unusual.items() if value != getattr(Descents, name)}

    def run(self, task: Task, ledger: Ledger) -> Score:
        """The best of the seeds, the chains' ends and their means."""
        scores, best = start(task, ledger)
        incumbent = scores[best]
        per_round = min(self.per_round, len(task.engine.data["slope"].tokens))
        for epoch in range(self.epochs):
            before, found = incumbent.sparsities, []
            for chain, step in enumerate(self.steps):
                options = self.options.in_epoch(epoch, step, self.decay)
                ledger.spend(3 * options.rounds * per_round * ledger.tokens_per_sequence)
                seed = chain_seed(task.seed, epoch, chain)
                end = task.engine.descend(task.histograms, before, task.target, options, per_round, seed)
                found.append(ledger.evaluate(end))
            mean = np.mean([score.sparsities for score in found], axis=0)
            found.append(ledger.evaluate(task.budget.onto(mean, HIGHEST_DESCENDED)))
            if self.half_way:
                found.append(ledger.evaluate(task.budget.onto((before + mean) / 2.0, HIGHEST_DESCENDED)))
            incumbent = min([incumbent, *found], key=lambda score: score.loss_nats)
        return incumbent

    def method(
        self, name: str, fitness: FitnessName = "nll", compensation: CompensationOptions | None = None
    ) -> Method:
        """The method called ``name``, to be registered."""
        settings = self.settings() | ({"fitness": fitness, "top_k": KL_TOP_K} if fitness == "kl" else {})
        if compensation is not None:
            settings["compensation"] = {**vars(compensation), "top_k": KL_TOP_K}

        def run(task: Task, ledger: Ledger) -> None:
            self.run(task, ledger)

        return Method(
            name,
            run,
            spaces=("-",),
            settings=settings,
            most_evaluations=120,
            seconds=1.0,
            fitness=fitness,
            compensation=compensation,
        )


def _state(score: Score) -> SlotState:
    return SlotState.COMPLETE if np.isfinite(score.loss_nats) else SlotState.FAILED


def _optuna_tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


def _univariate_tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=False)


_STARTUP = "8 Gaussian steps of a sixth of each range"

for _name in ("uniform", "greedy-uniform", "fisher"):
    register(Method(_name, _one_vector(_name), spaces=("-",), settings={"evaluates": "the seed alone"}, random=False))
register(
    Method(
        "linear-ramp",
        _ramp,
        spaces=("-",),
        settings={"table": "greedy", **RampSettings().to_json()},
        random=False,
    )
)
register(
    Method(
        "was-monotone",
        _sampler("was-monotone"),
        spaces=("-",),
        settings={"table": "greedy", "sampler": "multivariate TPE", "startup": _STARTUP, "seeds": False},
        seconds=0.03,
    )
)
register(Method("random", _sampler("random"), settings={"draws": "uniform in the box"}))
register(
    Method(
        "tpe-default",
        _sampler("tpe", _optuna_tpe),
        settings={"sampler": "TPESampler", "options": "Optuna's defaults, 10 uniform startup trials"},
        seconds=0.2,
    )
)
register(
    Method(
        "tpe-univariate",
        _sampler("tpe", _univariate_tpe),
        settings={"sampler": "TPESampler", "multivariate": False, "startup": "10 uniform"},
        seconds=0.2,
    )
)
register(
    Method(
        "tpe",
        _sampler("tpe"),
        settings={"sampler": "TPESampler", "multivariate": True, "startup": _STARTUP},
        seconds=0.2,
    )
)
_CMAES = {"sampler": "CmaEsSampler", "sigma": "a sixth of each range"}
register(Method("cmaes", _sampler("cmaes"), settings=_CMAES))
register(Method("cmaes-kl", _sampler("cmaes"), settings={**_CMAES, "fitness": "kl", "top_k": KL_TOP_K}, fitness="kl"))
register(
    Method(
        "gp",
        _sampler("gp"),
        settings={"sampler": "GPSampler", "startup": _STARTUP, "deterministic_objective": True},
        most_evaluations=120,
        seconds=2.0,
    )
)
register(Method("evolution", _evolution, spaces=("levels", "full"), settings=EvolutionSettings().to_json()))
register(Descents().method("descent"))
register(Descents().method("descent-kl", "kl"))
# As many sequences as fit into the tokens of 200 evaluations, where one is of 64.
register(Descents().method("descent-compensated", compensation=CompensationOptions(sequences=10)))
# For an evaluation of 24 sequences, of which a round takes the same share as 24 do of 64: 117 evaluations in all again.
register(Descents(per_round=9).method("descent-9"))
register(Descents(per_round=9).method("descent-9-compensated", compensation=CompensationOptions()))
