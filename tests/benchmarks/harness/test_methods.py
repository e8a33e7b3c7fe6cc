from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.harness import racing
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.methods import METHODS, Method, register, run_method, start
from tests.benchmarks.bowl import N_SEQUENCES, SHAPE, TARGET, TOKENS, seeds
from was_search.errors import ConfigError
from was_search.vectors import descent
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.space import SPACES

RULES = list(racing.RULES)
SEARCHES = [
    (name, space)
    for name, method in METHODS.items()
    for space in method.spaces
    if method.random and name not in {"was-monotone", "gp", *RULES} and not name.startswith("descent")
]


def run(name: str, task, ledger):
    run_method(METHODS[name], task, ledger)
    return ledger.at(ledger.budget)


@pytest.mark.parametrize(("name", "space"), SEARCHES)
def test_every_search_starts_at_the_seeds_and_improves(task, new_ledger, bowl, name, space):
    ledger = new_ledger(20)
    run(name, task(space), ledger)
    at_start = min(bowl.loss(seed.sparsities) for seed in seeds())
    dense = 1 if METHODS[name].fitness == "kl" else 0
    assert ledger.at((3 + dense) * N_SEQUENCES * TOKENS).loss_nats == pytest.approx(at_start, abs=1e-12)
    # What is left does not cover another evaluation: of one sequence for the evolution, else of the whole split.
    assert 0 <= ledger.left < ledger.tokens_per_evaluation
    if name != "random":
        assert ledger.at(ledger.budget).loss_nats < at_start
    assert all(SHAPE.sparsity(i.sparsities) == pytest.approx(TARGET, abs=1e-12) for i in ledger.incumbents)


@pytest.mark.parametrize("space", SPACES)
def test_the_gaussian_process_improves(task, new_ledger, bowl, space):
    """Few evaluations: a fit takes up to a second."""
    best = run("gp", task(space), new_ledger(13))
    assert best.loss_nats < min(bowl.loss(seed.sparsities) for seed in seeds())


def test_the_full_space_reaches_what_levels_cannot(task, new_ledger, bowl):
    """The bowl's best vector lies on no table, so with many evaluations all projections win."""
    levels, full = (run("evolution", task(space), new_ledger(400)).loss_nats for space in ("levels", "full"))
    assert full < levels
    assert full < 2.0 + 0.3 * (levels - 2.0)


@pytest.mark.parametrize("name", ["cmaes", "tpe", "tpe-default", "random", "evolution"])
def test_runs_repeat_and_differ_by_seed(task, new_ledger, name):
    first, second, other = (
        [
            i.loss_nats
            for i in (lambda ledger: (run(name, task(seed=seed), ledger), ledger)[1])(new_ledger(14)).incumbents
        ]
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_one_vector_methods_cost_one_evaluation(task, new_ledger, bowl):
    for seed in seeds():
        ledger = new_ledger(10)
        best = run(seed.name, task("-"), ledger)
        assert ledger.spent == N_SEQUENCES * TOKENS
        np.testing.assert_array_equal(best.sparsities, seed.sparsities)


def test_the_published_baselines_lie_on_the_greedy_table(task, new_ledger, bowl):
    """Neither knows the seeds, and the monotone one's levels rise with depth."""
    table = seeds()[1].table
    for name in ("linear-ramp", "was-monotone"):
        ledger = new_ledger(25)
        best = run(name, task("-"), ledger)
        levels = SHAPE.levels(best.sparsities)
        np.testing.assert_allclose(table.sparsities(levels), best.sparsities, atol=1e-12)
        if name == "was-monotone":
            assert np.all(np.diff(levels) >= -1e-12)


def test_losses_that_are_not_finite_do_not_stop_a_search(task, new_ledger, bowl):
    ordinary = bowl.losses

    def sometimes(asked):
        return [losses * (np.nan if len(bowl.calls) % 3 == 0 else 1.0) for losses in ordinary(asked)]

    for name in ("tpe", "cmaes", "evolution"):
        bowl.calls.clear()
        ledger = new_ledger(15)
        ledger._losses_of = sometimes
        assert np.isfinite(run(name, task(), ledger).loss_nats)


def test_the_best_seed_is_found(task, new_ledger, bowl):
    bowl.best = seeds()[1].sparsities
    scores, best = start(task(), new_ledger(3))
    assert best == 1
    assert [score.loss_nats for score in scores] == pytest.approx([bowl.loss(s.sparsities) for s in seeds()])


def test_a_method_that_spends_tokens_otherwise(task, new_ledger, bowl, monkeypatch):
    """How others are added: what costs no evaluation is charged, here three times the tokens of a backward pass."""
    monkeypatch.setitem(METHODS, "descent", Method("descent", descend, spaces=("-",)))
    ledger = new_ledger(8)
    best = run("descent", task("-"), ledger)
    assert ledger.spent == 8 * N_SEQUENCES * TOKENS
    assert ledger.n_full == 2
    assert best.loss_nats == pytest.approx(2.0)


def descend(task, ledger):
    """Knows the gradient of the bowl: one step of it lands at the best vector."""
    bowl = ledger._losses_of.__self__
    here = task.seeds[0].sparsities
    while True:
        ledger.spend(3 * ledger.tokens_per_evaluation)
        here = here - 0.5 * 2.0 * (here - bowl.best)
        ledger.evaluate(here)


def test_refuses_a_second_method_of_a_name():
    with pytest.raises(ConfigError, match="method: 'tpe' is registered twice"):
        register(Method("tpe", lambda task, ledger: None))


def test_settings_are_plain():
    """They are written into every row."""
    import json

    for method in METHODS.values():
        assert json.dumps(method.settings)
        assert method.settings


class Slopes:
    """Stands for an engine: the bowl's exact slopes instead of a model's."""

    def __init__(self, bowl) -> None:
        self.data = {"slope": SimpleNamespace(tokens=np.zeros((4, TOKENS)))}
        self.bowl = bowl

    def descend(self, histograms, start, target, options, per_round, seed):
        return descent.descend(
            lambda point: 2 * (point - self.bowl.best), start, SparsityBudget(SHAPE, target), options
        )


@pytest.mark.parametrize(("name", "dense"), [("descent", 0), ("descent-kl", 1)])
def test_a_descent_pays_for_its_slopes_and_nears_the_best(task, new_ledger, bowl, name, dense):
    ledger = new_ledger(200)
    best = run(name, dataclasses.replace(task("-"), engine=Slopes(bowl)), ledger)
    # Three seeds, then twice: two chains of 24 rounds on all 4 sequences, thrice their tokens, and three vectors.
    own = (3 + 2 * 3 + dense) * ledger.tokens_per_evaluation
    assert ledger.spent == own + 2 * 2 * 3 * 24 * 4 * TOKENS
    assert best.loss_nats - 2.0 < 0.1 * (min(bowl.loss(seed.sparsities) for seed in seeds()) - 2.0)


@pytest.mark.parametrize(("name", "sequences"), [("descent", 64), ("descent-9", 24)])
def test_the_descents_of_a_standing_problem_fit_its_budget(task, bowl, name, sequences):
    """All four chains are paid for, and little is left of 120 evaluations."""
    engine = Slopes(bowl)
    engine.data["slope"].tokens = np.zeros((94, TOKENS))
    chains = []
    engine.descend = lambda *arguments: chains.append(arguments) or arguments[1]
    ledger = Ledger(
        lambda asked: [np.full(len(chosen), 2.0) for _, chosen in asked],
        SHAPE,
        TARGET,
        n_sequences=sequences,
        tokens_per_sequence=TOKENS,
        evaluations=120.0,
    )
    run(name, dataclasses.replace(task("-"), engine=engine), ledger)
    assert len(chains) == 4
    assert ledger.spent == 117 * ledger.tokens_per_evaluation


@pytest.mark.slow
def test_stopping_saves_tokens_on_the_same_number_of_trials(task, new_ledger):
    books = {name: new_ledger(200) for name in RULES}
    for name, ledger in books.items():
        run(name, task(), ledger)
    spent = {name: ledger.spent / ledger.tokens_per_evaluation for name, ledger in books.items()}
    assert spent["cmaes-trials"] == 3 + 120
    # The sequences' noise is common to all vectors, so every worse one is stopped after 8 of the 16 sequences.
    assert spent["cmaes-raced-10"] < 0.75 * spent["cmaes-trials"]
    assert spent["cmaes-rungs-33"] < 0.9 * spent["cmaes-rungs-only"] < 0.9 * spent["cmaes-trials"]
    losses = {name: ledger.at(ledger.budget).loss_nats for name, ledger in books.items()}
    assert max(losses.values()) - 2.0 < 1.5 * (losses["cmaes-trials"] - 2.0)


def test_after_descents_stopping_saves_tokens_too(task, new_ledger, bowl):
    spent = {}
    for name in ("descent-tpe-trials", "descent-tpe-rungs"):
        ledger = new_ledger(250)
        run(name, dataclasses.replace(task(), engine=Slopes(bowl)), ledger)
        spent[name] = ledger.spent / ledger.tokens_per_evaluation
    # 2 * 2 * 3 * 24 rounds on a quarter of an evaluation's sequences, 9 vectors, 120 trials.
    assert spent["descent-tpe-trials"] == 72 + 9 + 120
    assert spent["descent-tpe-rungs"] - 81 < 0.75 * 120


@pytest.mark.parametrize("name", ["descent-tpe", "descent-cmaes"])
def test_trials_go_on_from_the_descents(task, new_ledger, bowl, name):
    ledger = new_ledger(60)
    best = run(name, dataclasses.replace(task("full"), engine=Slopes(bowl)), ledger)
    after = [i.loss_nats for i in ledger.incumbents if i.tokens <= 43 * ledger.tokens_per_evaluation]
    assert best.loss_nats <= after[-1]
    assert ledger.left < ledger.tokens_per_evaluation
