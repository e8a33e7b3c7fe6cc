from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.doubles.tiny_models import tiny_model
from was_search.checkpoints.quantised import quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.compensation import Compensation
from was_search.errors import InfeasibleError
from was_search.masks.calibration import histogram_pass
from was_search.masks.compensating import CompensationOptions, CompensationState, PassesHere, learn_steps, step_rows
from was_search.masks.divergence import DenseTop
from was_search.masks.evaluation import dense_top, evaluate_thresholds
from was_search.masks.masked_model import MaskedModel
from was_search.vectors.budget import SparsityBudget
from was_search.weight_format import WeightFormat

OPTIONS = CompensationOptions(steps=30, sequences=4, scale_rate=1e-2, constant_rate=2e-2, move=8e-3)


@pytest.fixture
def masked(make_llama):
    return MaskedModel.of(make_llama(torch.float32), "l2")


@pytest.fixture
def data(make_data, tokens):
    return make_data(tokens)


@pytest.fixture
def start(masked, data):
    sparsities = np.full((3, 7), 0.6)
    thresholds = histogram_pass(masked, data, None)[0].thresholds(sparsities)
    return CompensationState.start(masked.shape, sparsities, thresholds)


def learned(masked, data, start, options=OPTIONS, per_call=30, seed=0):
    budget, top = SparsityBudget(masked.shape, 0.6), dense_top(masked, data, 20)
    state = start
    while state.done < options.steps:
        state = learn_steps(PassesHere(masked, data, top), state, budget, options, seed=seed, steps=per_call)
    return state, budget


def divergence(masked, data, sparsities, compensation):
    model = masked.compensated(compensation)
    histograms = histogram_pass(masked, data, None)[0]
    for _ in range(4):
        histograms = histogram_pass(model, data, histograms.thresholds(sparsities))[0]
    found = evaluate_thresholds(model, data, histograms.thresholds(sparsities), top=dense_top(masked, data, 20))
    return found.loss_nats


def test_the_divergence_falls_within_the_budget(masked, data, start):
    state, budget = learned(masked, data, start)
    sparsities = state.mean_sparsities(budget, OPTIONS)
    assert masked.shape.sparsity(sparsities) == pytest.approx(0.6, abs=1e-9)
    assert len(state.losses) == state.done == 30
    before = divergence(masked, data, start.sparsities, None)
    moved = divergence(masked, data, sparsities, state.compensation(masked.shape))
    assert moved < 0.7 * before
    still = dataclasses.replace(OPTIONS, move=0.0)
    kept, _ = learned(masked, data, start, still)
    np.testing.assert_allclose(kept.mean_sparsities(budget, still), start.sparsities, atol=1e-12)
    assert divergence(masked, data, start.sparsities, kept.compensation(masked.shape)) < before


def test_sparsities_move_away_from_a_bad_place(masked, data, start):
    budget, uneven = SparsityBudget(masked.shape, 0.6), start.sparsities.copy()
    uneven[:, 6] = 0.95
    sparsities = budget.onto(uneven, 0.98)
    thresholds = histogram_pass(masked, data, None)[0].thresholds(sparsities)
    bad = CompensationState.start(masked.shape, sparsities, thresholds)
    found = {}
    for move in (0.0, 0.02):
        options = dataclasses.replace(OPTIONS, move=move)
        state, _ = learned(masked, data, bad, options)
        ends = state.mean_sparsities(budget, options)
        found[move] = divergence(masked, data, ends, state.compensation(masked.shape))
    assert found[0.02] < 0.95 * found[0.0]
    assert found[0.0] < 0.95 * divergence(masked, data, sparsities, None)


def test_a_repeated_call_gives_the_same_bits_and_calls_may_be_cut(masked, data, start):
    options = dataclasses.replace(OPTIONS, steps=6)
    one, again = (learned(masked, data, start, options, per_call=3)[0] for _ in range(2))
    for name in ("sparsities", "thresholds", "values", "moments", "direction", "kept"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert one.losses == again.losses
    # Cut elsewhere, masks begin from histograms of other tokens; it stays the same run.
    whole, _ = learned(masked, data, start, options, per_call=6)
    assert whole.losses[:3] == one.losses[:3]
    np.testing.assert_allclose(whole.values, one.values, atol=0.02)


def test_rates_of_zero_leave_vectors_alone(masked, data, start):
    options = dataclasses.replace(OPTIONS, steps=3, scale_rate=0.0, constant_rate=0.0)
    state, _ = learned(masked, data, start, options)
    np.testing.assert_array_equal(state.values, Compensation.none(masked.shape).flat())


def test_all_sequences_come_once_before_one_comes_again():
    options = CompensationOptions(sequences=3)
    rows = [row for number in range(10) for row in step_rows(10, options, 5, number)]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == sorted(rows[20:]) == list(range(10))
    assert rows[:10] != rows[10:20]
    assert step_rows(2, options, 0, 7) in ([0, 1], [1, 0])


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("move", 1.0), ("average", 0.0), ("scale_rate", -1.0)])
def test_options_out_of_range(name, value):
    with pytest.raises(InfeasibleError, match=f"{name}: must"):
        CompensationOptions(**{name: value})


def prepared(kind: str) -> MaskedModel:
    if kind == "fused":
        return MaskedModel.of(tiny_model("phi3", torch.float32), "l2", "shared")
    model = tiny_model("llama", torch.float32)
    if kind == "int8":
        form = WeightFormat.parse("int8:32")
        assert form is not None
        quantise_projections(find_structure(model), form)
    return MaskedModel.of(model, "l1", "shared" if kind == "shared" else "separate", recompute=kind == "recompute")


@pytest.mark.parametrize("kind", ["fused", "int8", "shared", "recompute"])
def test_every_kind_of_model_learns(kind, make_data, tokens):
    masked, data = prepared(kind), make_data(tokens)
    sparsities = np.full(masked.shape.params.shape, 0.5)
    thresholds = histogram_pass(masked, data, None)[0].thresholds(sparsities)
    options = dataclasses.replace(OPTIONS, steps=12)
    budget, top = SparsityBudget(masked.shape, 0.5), dense_top(masked, data, 20)
    state = CompensationState.start(masked.shape, sparsities, thresholds)
    state = learn_steps(PassesHere(masked, data, top), state, budget, options, seed=0, steps=12)
    found = state.mean_sparsities(budget, options)
    assert masked.shape.sparsity(found) == pytest.approx(0.5, abs=1e-9)
    for b, group in ((b, group) for b in range(masked.shape.n_blocks) for group in masked.shape.groups):
        assert len(set(found[b, list(group)])) == 1
    assert np.mean(state.losses[-4:]) < np.mean(state.losses[:4])


@pytest.mark.parametrize("where", ["weights", "loss"])
def test_numbers_that_are_not_finite(masked, data, start, where):
    top = dense_top(masked, data, 20)
    if where == "weights":
        with torch.no_grad():
            masked.structure.blocks[1].projections["down"].weight[0, 0] = torch.inf
    else:
        top = DenseTop(top.indices, np.full_like(top.log_probs, np.inf))
    with pytest.raises(InfeasibleError, match="overflow; use bfloat16 or float32"):
        learn_steps(PassesHere(masked, data, top), start, SparsityBudget(masked.shape, 0.6), OPTIONS, seed=0, steps=1)
