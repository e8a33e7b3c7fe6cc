from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness.baselines import EvolutionSettings, RampSettings, evolve, linear_ramp, mutate, ramp_levels
from benchmarks.harness.ledger import Exhausted
from tests.benchmarks.bowl import N_SEQUENCES, SHAPE, TARGET, TOKENS, seeds
from was_search.errors import ConfigError

WEIGHTS = SHAPE.params.ravel().astype(float)
HIGHEST = np.full(WEIGHTS.shape, 0.99)


def test_mutations_keep_the_budget_and_the_bounds():
    """Two thousand in a row: rounding adds up to far less than 1e-12."""
    rng = np.random.default_rng(0)
    units = np.full(WEIGHTS.shape, 0.9)
    for _ in range(2000):
        units = mutate(units, WEIGHTS, HIGHEST, rng, EvolutionSettings())
        assert units.min() >= 0.0 and units.max() <= 0.99
    assert SHAPE.sparsity(units.reshape(-1, 7)) == pytest.approx(0.9, abs=1e-12)
    assert units.std() > 0.02  # they did move


def test_a_mutation_moves_few_units_by_a_small_step():
    rng = np.random.default_rng(1)
    units = np.full(WEIGHTS.shape, 0.5)
    moved = [mutate(units, WEIGHTS, HIGHEST, rng, EvolutionSettings()) - units for _ in range(300)]
    counts = [int((np.abs(move) > 1e-12).sum()) for move in moved]
    assert min(counts) == 2 and max(counts) <= 6
    # P(smaller of two draws from 1..3 is 1) = 5/9; 300 draws: 3 % standard error.
    assert np.mean([count == 2 for count in counts]) == pytest.approx(5 / 9, abs=0.12)
    assert max(np.abs(move).max() for move in moved) <= 3 * 0.04 + 1e-12


def test_one_unit_has_nowhere_to_move():
    assert mutate(np.array([0.6]), np.ones(1), np.ones(1), np.random.default_rng(0), EvolutionSettings()) == [0.6]


def start(ledger):
    units = seeds()[0].sparsities.ravel()
    return ledger.evaluate(units.reshape(-1, 7)), units


def run(ledger, parent, units, settings=None):
    with pytest.raises(Exhausted):
        evolve(
            ledger,
            parent,
            units,
            WEIGHTS,
            HIGHEST,
            lambda u: u.reshape(-1, 7),
            np.random.default_rng(0),
            settings or EvolutionSettings(),
        )


def test_halving_spends_what_it_says(new_ledger, bowl):
    """16 on 2 sequences, 4 up to 4, 2 up to 8, 1 up to 16: 16 * 2 + 4 * 2 + 2 * 4 + 1 * 8 = 56 of 16 each."""
    settings = EvolutionSettings()
    assert settings.sequences(N_SEQUENCES) == [2, 4, 8, 16]
    assert settings.generation(N_SEQUENCES) == 56
    generations = 7
    ledger = new_ledger(1 + generations * 56 / N_SEQUENCES)
    run(ledger, *start(ledger))
    assert ledger.spent == ledger.budget == (N_SEQUENCES + generations * 56) * TOKENS
    assert ledger.n_full == 1 + generations
    assert bowl.calls == [16] + generations * ([2] * 16 + [2] * 4 + [4] * 2 + [8])


def test_evolution_finds_a_better_vector(new_ledger, bowl):
    ledger = new_ledger(300)
    parent, units = start(ledger)
    run(ledger, parent, units)
    found = ledger.at(ledger.spent)
    assert found.loss_nats - 2.0 < 0.3 * (parent.loss_nats - 2.0)
    assert SHAPE.sparsity(found.sparsities) == pytest.approx(TARGET, abs=1e-12)
    losses = [incumbent.loss_nats for incumbent in ledger.incumbents]
    assert losses == sorted(losses, reverse=True)


def test_the_parent_gives_way_only_to_a_better_child(new_ledger, bowl):
    ledger = new_ledger(40)
    parent = ledger.evaluate(bowl.best)
    run(ledger, parent, bowl.best.ravel())
    assert len(ledger.incumbents) == 1


@pytest.mark.parametrize(
    ("rounds", "rule"),
    [
        (((0.5, 4), (0.25, 2)), "rounds: shares must rise within"),
        (((0.5, 4), (1.0, 2)), "rounds: shares must rise within"),
        (((0.25, 2), (0.5, 4)), "rounds: survivors must fall from at most 16 to at least 1"),
        (((0.25, 17), (0.5, 4)), "rounds: survivors must fall from at most 16 to at least 1"),
        (((0.25, 2), (0.5, 0)), "rounds: survivors must fall from at most 16 to at least 1"),
    ],
)
def test_refuses_rounds_that_do_not_halve(rounds, rule):
    with pytest.raises(ConfigError, match=rule):
        EvolutionSettings(rounds=rounds)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.3])
def test_ramp_levels_are_linear_in_depth(slope):
    levels = ramp_levels(slope, SHAPE, seeds()[1].table, TARGET)
    np.testing.assert_allclose(np.diff(levels), slope / (SHAPE.n_blocks - 1), atol=1e-12)
    assert SHAPE.sparsity(np.repeat(levels[:, None], 7, axis=1)) == pytest.approx(TARGET, abs=1e-12)


def test_the_ramp_finds_the_best_slope(new_ledger, bowl):
    table = seeds()[1].table
    bowl.best = table.sparsities(ramp_levels(0.17, SHAPE, table, TARGET))
    ledger = new_ledger(100)
    linear_ramp(ledger, SHAPE, table, TARGET)
    assert ledger.n_full <= RampSettings().grid + RampSettings().refinements
    # The loss is a parabola of the slope (42 squares): 1e-6 nats are 0.0008 of slope.
    assert ledger.at(ledger.spent).loss_nats == pytest.approx(2.0, abs=1e-6)
