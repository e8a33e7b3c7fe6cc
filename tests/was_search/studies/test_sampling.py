from __future__ import annotations

import numpy as np
import pytest
from optuna.trial import TrialState

from was_search.errors import ConfigError
from was_search.shape import ModelShape
from was_search.studies.sampling import SAMPLERS, Suggester, make_sampler
from was_search.studies.slots import Slot, SlotState
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.space import LevelSpace, MonotoneSpace, level_params
from was_search.vectors.table import uniform_table

L = 5
SHAPE = ModelShape(((8,) * 7,) * L, ((8,) * 7,) * L)
CENTRE = np.array([0.4, 0.7, 0.6, 0.6, 0.7])
BEST = np.array([0.3, 0.8, 0.65, 0.55, 0.7])
STUDY = {
    SlotState.COMPLETE: TrialState.COMPLETE,
    SlotState.STOPPED: TrialState.COMPLETE,
    SlotState.FAILED: TrialState.FAIL,
}


def space_of(name: str):
    if name == "was-monotone":
        return MonotoneSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE))
    return LevelSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE), CENTRE)


def loss(space, params) -> float:
    return 1.0 + float(np.sum((space.levels(params) - BEST) ** 2))


def seed_slot(space) -> Slot:
    params = dict(space.centre)
    return Slot(0, SlotState.COMPLETE, origin="seed:fisher", params=params, loss_nats=loss(space, params))


def run(suggester: Suggester, space, numbers) -> list[Slot]:
    slots = []
    for number in numbers:
        params = suggester.suggest(number)
        value = loss(space, params)
        suggester.tell(number, SlotState.COMPLETE, value)
        slots.append(Slot(number, SlotState.COMPLETE, origin="sampler:x", params=params, loss_nats=value))
    return slots


def states(suggester: Suggester) -> list[TrialState]:
    return [trial.state for trial in suggester._study.get_trials(deepcopy=False)]


def some(name: str, n: int) -> int:
    """At most ten with the Gaussian process: a fit takes up to a second."""
    return min(n, 10) if name == "gp" else n


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_suggests_points_of_the_space(name):
    space = space_of(name)
    suggester = Suggester(name, space, seed=1)
    if name != "was-monotone":
        suggester.restore([seed_slot(space)])
    for slot in run(suggester, space, range(1, some(name, 15))):
        assert set(slot.params) == set(space.distributions)
        assert all(space.distributions[k]._contains(v) for k, v in slot.params.items())
        levels = space.levels(slot.params)
        assert levels.mean() == pytest.approx(0.6, abs=1e-13)
        if name == "was-monotone":
            assert np.all(np.diff(levels) >= 0)
    assert len({tuple(t.params.values()) for t in suggester._study.trials}) == len(suggester._study.trials)


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_model_based_samplers_find_a_better_vector(name):
    space = space_of(name)
    suggester = Suggester(name, space, seed=0)
    suggester.restore([seed_slot(space)])
    found = run(suggester, space, range(1, 61))
    assert min(slot.loss_nats for slot in found) - 1.0 < 0.5 * (loss(space, space.centre) - 1.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_suggests_the_same(name):
    space = space_of(name)
    first, second, other = (
        [slot.params for slot in run(Suggester(name, space, seed=seed), space, range(some(name, 12)))]
        for seed in (3, 3, 4)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("name", ["tpe", "gp", "was-monotone"])
def test_startup_steps_depend_on_seed_and_slot_alone(name):
    space = space_of(name)
    a, b = Suggester(name, space, seed=7), Suggester(name, space, seed=7)
    one_by_one = {number: a.suggest(number) for number in (1, 2, 3)}
    assert {number: b.suggest(number) for number in (3, 1, 2)} == one_by_one
    assert one_by_one[1] != one_by_one[2]
    assert Suggester(name, space, seed=8).suggest(1) != one_by_one[1]


def test_startup_steps_are_gaussian_around_the_centre():
    space = space_of("tpe")
    suggester = Suggester("tpe", space, seed=0, n_startup=400)
    raw = np.array([list(suggester.suggest(number).values()) for number in range(400)])
    widths = [d.high - d.low for d in space.distributions.values()]
    # A sixth of the range, so bounds at three sigmas clip almost nothing; 400 samples: 3.5 % standard error.
    np.testing.assert_allclose(raw.std(axis=0), np.mean(widths) / 6, rtol=0.15)
    np.testing.assert_allclose(raw.mean(axis=0), CENTRE, atol=4 * np.mean(widths) / 6 / 20)


def test_cmaes_starts_with_the_same_step():
    """Optuna takes its sigma on the unit cube, whatever the radius."""
    for radius in (0.05, 0.2):
        space = LevelSpace(SparsityBudget(SHAPE, 0.6), uniform_table(SHAPE), np.full(L, 0.6), radius)
        first = []
        for seed in range(60):
            suggester = Suggester("cmaes", space, seed=seed)
            suggester.restore([seed_slot(space)])
            first.append(list(suggester.suggest(1).values()))
        # 300 values; CMA-ES resamples outside the bounds at three sigmas.
        assert np.std(first) == pytest.approx(2 * radius / 6, rel=0.15)


@pytest.mark.parametrize("name", SAMPLERS)
def test_restoring_gives_the_same_trials(name):
    space = space_of(name)
    first = Suggester(name, space, seed=2)
    slots = [seed_slot(space)]
    first.restore(slots)
    slots += run(first, space, range(1, 12))
    stopped, failed, waiting = (first.suggest(number) for number in (12, 13, 14))
    first.tell(12, SlotState.STOPPED, 2.5)
    first.tell(13, SlotState.FAILED, None)
    slots.append(Slot(12, SlotState.STOPPED, origin="sampler:x", params=stopped, loss_nats=2.5, losses=np.ones(16)))
    slots.append(Slot(13, SlotState.FAILED, origin="sampler:x", params=failed, error="nan"))
    slots.append(Slot(14, SlotState.RUNNING, origin="sampler:x", params=waiting))
    slots.append(Slot(15, SlotState.WAITING))
    again = Suggester(name, space, seed=2)
    again.restore(slots)
    assert states(again) == states(first)
    ours, theirs = (s._study.get_trials(deepcopy=False) for s in (first, again))
    assert [t.params for t in ours] == [t.params for t in theirs]
    assert [t.values for t in ours] == [t.values for t in theirs]
    assert again._startup_left == 0
    again.tell(14, SlotState.COMPLETE, 1.5)  # the one that was under way
    assert states(again).count(TrialState.RUNNING) == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_resumed_search_does_not_repeat_itself(name):
    space = space_of(name)
    first = Suggester(name, space, seed=5, n_startup=3)
    slots = [seed_slot(space)]
    first.restore(slots)
    slots += run(first, space, range(1, 9))
    again = Suggester(name, space, seed=5, n_startup=3)
    again.restore(slots)
    seen = {tuple(slot.params.values()) for slot in slots}
    for slot in run(again, space, range(9, 12 if name == "gp" else 17)):
        assert tuple(slot.params.values()) not in seen


def test_qmc_goes_on_with_its_sequence():
    space = space_of("qmc")
    whole = Suggester("qmc", space, seed=5)
    whole.restore([seed_slot(space)])
    slots = [seed_slot(space), *run(whole, space, range(1, 6))]
    expected = [whole.suggest(number) for number in (6, 7)]
    again = Suggester("qmc", space, seed=5)
    again.restore(slots)
    assert [again.suggest(number) for number in (6, 7)] == expected


def test_cmaes_resumes_at_the_best_slot():
    space = space_of("cmaes")
    best = {name: d.low + 0.05 * space.radius for name, d in space.distributions.items()}
    slots = [
        seed_slot(space),
        Slot(1, SlotState.COMPLETE, origin="sampler:cmaes", params=best, loss_nats=0.5),
        Slot(
            2,
            SlotState.STOPPED,
            origin="sampler:cmaes",
            params=dict(space.centre),
            loss_nats=0.1,
            losses=np.ones(8),
        ),
    ]
    again = Suggester("cmaes", space, seed=0)
    again.restore(slots)
    raw = np.array([list(again.suggest(number).values()) for number in range(3, 9)])
    assert np.all(raw.mean(axis=0) < CENTRE - 0.25 * space.radius)


@pytest.mark.parametrize(
    ("state", "loss_nats", "value"),
    [(SlotState.COMPLETE, 2.0, 2.0), (SlotState.STOPPED, 2.5, 2.5), (SlotState.FAILED, None, None)],
)
def test_outcomes(state, loss_nats, value):
    space = space_of("tpe")
    suggester = Suggester("tpe", space, seed=0)
    suggester.suggest(4)
    suggester.tell(4, state, loss_nats)
    trial = suggester._study.trials[0]
    assert trial.state is STUDY[state]
    assert trial.value == value


def test_a_stop_without_a_loss_fails():
    suggester = Suggester("random", space_of("random"), seed=0)
    suggester.suggest(0)
    suggester.tell(0, SlotState.STOPPED, None)
    assert states(suggester) == [TrialState.FAIL]


def test_a_slot_that_is_told_twice_or_unknown_is_passed_over():
    suggester = Suggester("random", space_of("random"), seed=0)
    suggester.suggest(3)
    for _ in range(2):
        suggester.tell(3, SlotState.COMPLETE, 1.0)
    suggester.tell(99, SlotState.COMPLETE, 1.0)
    assert states(suggester) == [TrialState.COMPLETE]


def test_seeds_outside_the_space_are_left_out():
    space = space_of("tpe")
    far = level_params(np.full(L, 0.99))
    other = {"rise_1": 0.1}
    suggester = Suggester("tpe", space, seed=0)
    suggester.restore(
        [
            Slot(0, SlotState.COMPLETE, origin="seed:uniform", params=far, loss_nats=1.0),
            Slot(1, SlotState.COMPLETE, origin="seed:other", params=other, loss_nats=1.0),
            seed_slot(space),
        ]
    )
    assert states(suggester) == [TrialState.COMPLETE]


def test_waiting_suggestions_are_known_to_the_sampler():
    """Several workers: the constant liar sees what is under way."""
    suggester = Suggester("tpe", space_of("tpe"), seed=0)
    found = [suggester.suggest(number) for number in range(20)]
    assert len({tuple(params.values()) for params in found}) == 20
    assert states(suggester) == [TrialState.RUNNING] * 20


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_block(name):
    shape = ModelShape(((8,) * 7,), ((8,) * 7,))
    space = LevelSpace(SparsityBudget(shape, 0.6), uniform_table(shape), np.array([0.6]))
    suggester = Suggester(name, space, seed=0)
    suggester.restore([Slot(0, SlotState.COMPLETE, origin="seed:fisher", params=dict(space.centre), loss_nats=1.0)])
    for number in range(1, 12):
        assert space.levels(suggester.suggest(number)) == pytest.approx(0.6)
        suggester.tell(number, SlotState.COMPLETE, 1.0)


def test_refuses_an_unknown_sampler():
    with pytest.raises(
        ConfigError, match="sampler: must be one of tpe, cmaes, gp, qmc, random, was-monotone, got 'grid'"
    ):
        make_sampler("grid", space_of("tpe"), 0, 0.1)
