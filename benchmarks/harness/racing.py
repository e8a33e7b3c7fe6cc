"""Methods that ask what stopping trials early saves and costs, and what trials are worth after descents.

``cmaes-trials`` is CMA-ES for a number of trials that are all evaluated in full; the others are the same search for
as many trials, of which some are stopped. A stopped trial is told its estimated loss, as in production.
``descent-tpe-trials`` and ``descent-tpe-rungs`` are the same pair for what the product does by default, TPE after
descents.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from benchmarks.harness.ledger import Ledger, Score
from benchmarks.harness.methods import Descents, Method, Run, Task, register, start
from was_search.masks.early_stop import StopRule, estimated_loss, rung_cuts
from was_search.shape import FloatArray
from was_search.studies.sampling import SamplerName, Suggester
from was_search.studies.slots import SlotState
from was_search.vectors.seeds import point_seed
from was_search.vectors.space import Space

TRIALS = 120

RULE: dict[str, float] = {"significance": 0.1, "keep": 0.5}
"""Stop rule as in ``was_search.service.settings``, which needs more packages than a GPU machine may have."""


def race(
    ledger: Ledger,
    suggester: Suggester,
    space: Space,
    best: Score,
    trials: int | None,
    *,
    significance: float = 0.0,
    keep: float = 1.0,
    rotate: int = 0,
) -> None:
    """Run ``trials`` of ``suggester`` from ``best`` on (None: to the ledger's end), stopped by a rule.

    Estimates refer to the vector that the trials began at, as in production. With ``rotate`` the sequences' order
    moves on by eight after each ``rotate`` trials.
    """
    history: list[FloatArray] = []
    reference = best.losses
    for number in count(1) if trials is None else range(1, trials + 1):
        params = suggester.suggest(number)
        shift = 8 * (number // rotate) % ledger.n_sequences if rotate else 0
        order = np.roll(np.arange(ledger.n_sequences), -shift)
        rule = None
        if significance or keep < 1.0:
            incumbent = best.losses[order]
            rule = StopRule(incumbent, significance, rung_cuts(history, incumbent, keep) if not rotate else ())
        score = ledger.evaluate(space.sparsities(params), order, rule=rule)
        seen = score.losses[order][: int(score.seen.sum())]
        history.append(seen)
        suggester.tell(number, SlotState.COMPLETE, estimated_loss(seen, reference[order]))
        if score.full and score.loss_nats < best.loss_nats:
            best = score


def _trials(**rule: float) -> Run:
    def run(task: Task, ledger: Ledger) -> None:
        scores, centre = start(task, ledger)
        space, best = task.space_around(task.seeds[centre]), scores[centre]
        suggester = Suggester("cmaes", space, seed=task.seed)
        _know_centre(suggester, space, best)
        race(ledger, suggester, space, best, TRIALS, **rule)  # type: ignore[arg-type]

    return run


def _after_descents(sampler: SamplerName, trials: int | None = None, **rule: float) -> Run:
    def run(task: Task, ledger: Ledger) -> None:
        best = Descents().run(task, ledger)
        space = task.space_around(point_seed("descent", best.sparsities, task.shape))
        suggester = Suggester(sampler, space, seed=task.seed)
        _know_centre(suggester, space, best)
        race(ledger, suggester, space, best, trials, **rule)  # type: ignore[arg-type]

    return run


def _know_centre(suggester: Suggester, space: Space, best: Score) -> None:
    suggester.observe(0, dict(space.centre))
    suggester.tell(0, SlotState.COMPLETE, best.loss_nats)


RULES: dict[str, dict[str, float]] = {
    "cmaes-trials": {},
    "cmaes-raced-01": {"significance": 0.01},
    "cmaes-raced-10": {"significance": 0.1},
    "cmaes-raced-20": {"significance": 0.2},
    "cmaes-rungs-50": {"significance": 0.1, "keep": 0.5},
    "cmaes-rungs-33": {"significance": 0.1, "keep": 1 / 3},
    "cmaes-rungs-only": {"keep": 0.5},
    "cmaes-rotated": {"significance": 0.1, "rotate": 8},
}
for _name, _rule in RULES.items():
    settings = {"trials": TRIALS, "racing": "none"} if not _rule else {"trials": TRIALS, **_rule}
    register(Method(_name, _trials(**_rule), settings=settings, most_evaluations=125))

for _sampler in ("tpe", "cmaes"):
    register(
        Method(
            f"descent-{_sampler}",
            _after_descents(_sampler, **RULE),  # type: ignore[arg-type]
            settings={"descents": Descents().settings(), **RULE},
            most_evaluations=250,
            seconds=0.5,
        )
    )
for _name, _rule in {"trials": {}, "rungs": RULE}.items():
    register(
        Method(
            f"descent-tpe-{_name}",
            _after_descents("tpe", TRIALS, **_rule),
            settings={"descents": Descents().settings(), "trials": TRIALS, **(_rule or {"racing": "none"})},
            most_evaluations=250,
            seconds=0.5,
        )
    )
