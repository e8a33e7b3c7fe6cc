"""One mask for q, k, v and one for gate, up, from the norms of their weights together to the plan."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Phi3Config, Phi3ForCausalLM

from was_search.checkpoints.structure import find_structure
from was_search.errors import ModelError, PlanError
from was_search.masks.block_error import block_error
from was_search.masks.calibration import histogram_pass
from was_search.masks.evaluation import evaluate_thresholds
from was_search.masks.masked_model import MaskedModel, structure_norms
from was_search.masks.masking import Masking
from was_search.masks.ops import Ops
from was_search.masks.pricing import DEFAULT_GRID, price_sums
from was_search.masks.score import column_norms, combined_norms
from was_search.masks.slope import slope_pass
from was_search.plan import JSON_NAME, Plan
from was_search.shape import SEPARATE, SHARED, ModelShape
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions, descend
from was_search.vectors.greedy import block_path, path, spend
from was_search.vectors.seeds import Seed, baseline_seeds, fisher_seed, point_seed, retarget
from was_search.vectors.space import SPACES, make_space

GRID = np.array([0.0, 0.2, 0.5, 0.9])
SHAPE = ModelShape(
    ((8, 8, 8, 8, 8, 8, 20), (12, 12, 12, 12, 12, 12, 30)),
    ((8, 2, 2, 8, 20, 20, 8), (12, 3, 3, 12, 30, 30, 12)),
    "shared",
)
BUDGET = SparsityBudget(SHAPE, 0.6)


def is_tied(sparsities: np.ndarray) -> bool:
    return all(np.array_equal(sparsities[..., p], sparsities[..., group[0]]) for group in SHARED for p in group)


def tied(values: np.ndarray) -> np.ndarray:
    return SHAPE.copied(values)


def groups_of(structure, b):
    """Every group of a block with its weights, stacked upon one another."""
    block = structure.blocks[b]
    names = ("q", "k", "v", "o", "gate", "up", "down")
    return [(group, [block.projections[names[p]] for p in group]) for group in SHARED]


@pytest.fixture
def model(make_llama):
    return make_llama(torch.float64)


def fused_copy(model) -> Phi3ForCausalLM:
    """A Phi-3 that computes what a Llama does: the same weights, q, k, v and gate, up stacked."""
    own = model.config
    config = Phi3Config(
        **{
            name: getattr(own, name)
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters"),
            )
        },
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    fused = Phi3ForCausalLM(config).to(model.dtype).eval().requires_grad_(False)
    weights = dict(model.state_dict())
    for b in range(own.num_hidden_layers):
        attention, mlp = f"model.layers.{b}.self_attn.", f"model.layers.{b}.mlp."
        weights[f"{attention}qkv_proj.weight"] = torch.cat([weights.pop(f"{attention}{n}_proj.weight") for n in "qkv"])
        weights[f"{mlp}gate_up_proj.weight"] = torch.cat([weights.pop(f"{mlp}{n}_proj.weight") for n in ("gate", "up")])
    fused.load_state_dict(weights)
    return fused


@pytest.mark.parametrize("kind", ["l1", "l2", "none"])
def test_norms_are_those_of_the_stacked_weights(model, kind):
    structure = find_structure(model, "shared")
    norms = structure_norms(structure, kind)
    for b in range(3):
        for group, linears in groups_of(structure, b):
            expected = column_norms(torch.cat([linear.weight for linear in linears]), kind)
            for p in group:
                assert norms[b][p] is norms[b][group[0]]
                torch.testing.assert_close(norms[b][p], expected, rtol=1e-6, atol=0.0)


def test_combined_norms_of_one_weight_are_its_own():
    norms = torch.tensor([0.1, 3.0])
    assert combined_norms([norms], "l2") is norms
    torch.testing.assert_close(combined_norms([norms, 2 * norms], "l2"), norms * 5**0.5)
    torch.testing.assert_close(combined_norms([norms, 2 * norms], "l1"), norms * 3)


def test_masking_against_masks_made_projection_by_projection(model, tokens):
    structure = find_structure(model, "shared")
    thresholds = tied(np.random.default_rng(1).uniform(0.2, 1.5, (3, 7))).astype(np.float32)
    batch = torch.as_tensor(tokens[:3])
    dropped, handles = np.zeros((3, 7)), []
    for b in range(3):
        for group, linears in groups_of(structure, b):
            stacked = torch.cat([linear.weight for linear in linears]).norm(dim=0)
            for p, linear in zip(group, linears, strict=True):

                def hook(_, args, b=b, p=p, stacked=stacked):
                    keep = args[0].abs() * stacked >= float(thresholds[b, p])
                    keep[:, :2] = True
                    dropped[b, p] = 1 - keep[:, 2:].double().mean()
                    return (args[0] * keep,)

                handles.append(linear.register_forward_pre_hook(hook))
    with torch.inference_mode():
        expected = model(input_ids=batch).logits
        for handle in handles:
            handle.remove()
        with Masking(MaskedModel.of(model, "l2", "shared"), thresholds, dense_prefix=2, count=True) as masking:
            found = model(input_ids=batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(masking.achieved(), dropped, atol=1e-12)
    assert is_tied(masking.achieved())
    assert 0.05 < masking.achieved().mean() < 0.95


def test_a_shared_mask_is_made_once(model, tokens):
    calls = []

    def op(x, norms, threshold, prefix):
        calls.append(threshold)
        return x, torch.tensor(0)

    masked = MaskedModel.of(model, "l2", "shared", ops=Ops(mask=op))
    thresholds = np.arange(1, 22, dtype=np.float32).reshape(3, 7)
    with torch.inference_mode(), Masking(masked, thresholds):
        model(input_ids=torch.as_tensor(tokens[:2]))
        model(input_ids=torch.as_tensor(tokens[2:4]))
    assert calls == [*(7 * b + p for b in range(3) for p in (1, 4, 5, 7))] * 2


def test_projections_that_read_different_inputs_cannot_share_a_mask(make_llama, tokens):
    model = make_llama(seed=3)
    model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1.0,))
    with (
        torch.inference_mode(),
        Masking(MaskedModel.of(model, "l2", "shared"), None),
        pytest.raises(
            ModelError, match="block 1: q, k, v read different inputs and cannot share a mask; use --masks s"
        ),
    ):
        model(input_ids=torch.as_tensor(tokens[:2]))


def test_a_forward_that_was_broken_off_leaves_nothing_behind(model, tokens):
    masked = MaskedModel.of(model, "l2", "shared")
    thresholds = np.full((3, 7), 0.5, np.float32)
    fail = [True]

    def stop(*_):
        if fail:
            fail.clear()
            raise RuntimeError("broken off")

    with torch.inference_mode(), Masking(masked, thresholds):
        expected = model(input_ids=torch.as_tensor(tokens[:2])).logits
    handle = masked.structure.blocks[1].projections["k"].register_forward_hook(stop)
    with torch.inference_mode(), Masking(masked, thresholds):
        with pytest.raises(RuntimeError, match="broken off"):
            model(input_ids=torch.as_tensor(tokens[4:6]))
        found = model(input_ids=torch.as_tensor(tokens[:2])).logits
    handle.remove()
    assert torch.equal(found, expected)


def level_thresholds(histograms) -> np.ndarray:
    return np.stack([histograms.thresholds(np.full((3, 7), level)) for level in GRID], axis=-1)


@pytest.mark.parametrize("recompute", [False, True])
def test_prices_of_a_group_are_of_all_its_outputs_together(model, make_data, tokens, recompute):
    """By masking, multiplying out and adding g . dy over the group before squaring; g by autograd."""
    masked, data = MaskedModel.of(model, "l2", "shared", recompute=recompute), make_data(tokens)
    structure = masked.structure
    thresholds = level_thresholds(histogram_pass(masked, data, None)[0])
    sums, n = price_sums(masked, data, thresholds)
    assert n == 160
    expected = np.zeros((3, 4, len(GRID)))
    for sequence in tokens:
        seen, handles = {}, []
        for _, _, linear in structure.linears():

            def hook(linear, args, out, seen=seen):
                out = out if out.requires_grad else out.detach().requires_grad_(True)
                out.retain_grad()
                seen[linear] = (args[0].detach()[0], out)
                return out

            handles.append(linear.register_forward_hook(hook))
        ids = torch.as_tensor(sequence)[None]
        F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for b in range(3):
            for g, (group, linears) in enumerate(groups_of(structure, b)):
                stacked = torch.cat([linear.weight for linear in linears])
                x = seen[linears[0]][0]
                gradient = torch.cat([seen[linear][1].grad[0] for linear in linears], dim=-1)
                score = x.abs() * stacked.norm(dim=0)
                for level in range(len(GRID)):
                    kept = torch.where(score >= float(thresholds[b, group[0], level]), x, torch.zeros_like(x))
                    change = (gradient * F.linear(kept - x, stacked)).sum(-1)
                    expected[b, g, level] += float(0.5 * change[1:].square().sum())
    found = np.stack([sums[:, list(group)].sum(axis=1) for group in SHARED], axis=1)
    # As for separate masks: sums in float32 with cancellation, then squared.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7 * expected.max())
    params = structure.shape.params[..., None]
    for group in SHARED:  # one parameter of any member has the same price
        each = (sums / params)[:, list(group)]
        np.testing.assert_allclose(each, np.broadcast_to(each[:, :1], each.shape), rtol=1e-12)


def test_a_fused_model_gives_what_its_parts_give(model, tokens, make_data):
    """Phi-3 with a Llama's weights: histograms, prices, slopes, block errors and losses are the Llama's."""
    fused = fused_copy(model)
    point = SHAPE.copied(np.random.default_rng(2).uniform(0.2, 0.8, (3, 7)))
    found = []
    for each in (model, fused):
        masked, data = MaskedModel.of(each, "l2", "shared"), make_data(tokens, dtype="float64")
        histograms, seen, _ = histogram_pass(masked, data, None)
        prices = price_sums(masked, data, level_thresholds(histograms))[0]
        slopes = slope_pass(masked, data, point, histograms)
        error = block_error(masked, data.part(slice(4)), 1, histograms)(point[1])
        losses = evaluate_thresholds(masked, data, histograms.thresholds(point))
        found.append((masked.shape, histograms.counts, seen, prices, slopes, error, losses))
    (shape, counts, seen, prices, slopes, error, losses), other = found
    assert other[0] == shape
    # Norms of a fused weight are summed in another order: a score may fall into the next of two bins.
    assert np.abs(np.cumsum(other[1] - counts, axis=-1)).max() <= 2
    np.testing.assert_array_equal(other[2], seen)
    np.testing.assert_allclose(other[3], prices, rtol=0.05, atol=1e-3 * prices.max())
    np.testing.assert_allclose(other[4].slopes, slopes.slopes, rtol=0.05, atol=0.02 * np.abs(slopes.slopes).max())
    assert other[5] == pytest.approx(error, rel=1e-2)
    np.testing.assert_allclose(other[6].losses, losses.losses, rtol=5e-3)
    np.testing.assert_allclose(other[6].achieved, losses.achieved, atol=2e-3)
    assert is_tied(losses.achieved)
    assert is_tied(counts.sum(axis=-1))


def test_slopes_of_a_group_are_the_sum_of_its_members(model, make_data, tokens):
    """The group's slope is the change of the loss when its members' masks move together: by finite differences."""
    whole, data = MaskedModel.of(model, "l2", "shared"), make_data(tokens, batch_size=5)
    structure, norms = whole.structure, whole.norms
    histograms = histogram_pass(whole, data, None)[0]
    point = np.full((3, 7), 0.4)
    found = slope_pass(whole, data, point, histograms, width=0.0, window=0.1)
    limits = [histograms.thresholds(point + off) for off in (0.0, -0.1, 0.1)]
    leaves, handles = {}, []

    def hook(b, p):
        def apply(_, args):
            score = args[0].detach().abs() * norms[b][p]
            keep = score >= float(limits[0][b, p])
            keep[:, :1] = True
            window = (score >= float(limits[1][b, p])) & (score < float(limits[2][b, p]))
            window[:, :1] = False
            masked = args[0] * keep
            masked = masked if masked.requires_grad else masked.detach().requires_grad_(True)
            masked.retain_grad()
            leaves[b, p] = (args[0].detach(), window, masked)
            return (masked,)

        return apply

    for b, p, linear in structure.linears():
        handles.append(linear.register_forward_pre_hook(hook(b, p)))
    ids = torch.as_tensor(tokens)
    F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    each = np.zeros((3, 7))
    for key, (x, window, masked) in leaves.items():
        each[key] = -float((masked.grad * x * window).sum()) / 160 / 0.2
    for group in SHARED:
        expected = each[:, list(group)].sum(axis=1)
        np.testing.assert_allclose(
            found.slopes[:, list(group)].sum(axis=1), expected, rtol=1e-3, atol=1e-3 * np.abs(each).max()
        )
    per_parameter = found.slopes / structure.shape.params
    np.testing.assert_allclose(per_parameter[:, 1], per_parameter[:, 0], rtol=1e-12)


def prices_of(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.exponential(1, (2, 7, 1)) * GRID ** rng.uniform(1.2, 3, (2, 7, 1))


@pytest.mark.parametrize("target", [0.1, 0.5, 0.85])
def test_the_greedy_spends_on_groups(target):
    """As on a model whose groups are single projections."""
    prices = prices_of(0)
    found = spend(prices, GRID, SHAPE.params, target, groups=SHARED)
    parts = [list(group) for group in SHARED]
    merged = np.stack([prices[:, part].sum(axis=1) for part in parts], axis=1)
    params = np.stack([SHAPE.params[:, part].sum(axis=1) for part in parts], axis=1)
    expected = spend(
        np.concatenate([merged, np.zeros((2, 3, len(GRID)))], axis=1),
        GRID,
        np.concatenate([params, np.ones((2, 3), np.int64)], axis=1),
        target * params.sum() / (params.sum() + 6) + 0.9 * 6 / (params.sum() + 6),
    )
    for g, part in enumerate(parts):
        np.testing.assert_allclose(found[:, part[0]], expected[:, g], atol=1e-9)
    assert is_tied(found)
    assert SHAPE.sparsity(found) == pytest.approx(target, abs=1e-12)


def test_tables_of_both_greedies_are_tied():
    table = path(prices_of(1)[0], GRID, SHAPE.params[0], groups=SHARED)
    assert is_tied(table.sparsities)
    weight = np.random.default_rng(0).uniform(0.5, 2, 7)
    calls = []

    def error(sparsities: np.ndarray) -> float:
        calls.append(sparsities)
        return float((weight * sparsities**2).sum())

    greedy = block_path(error, SHAPE.params[0], step=0.1, groups=SHARED)
    assert is_tied(np.stack(calls))
    assert is_tied(greedy.sparsities)
    np.testing.assert_allclose(greedy.sparsities[-1], 0.95)
    np.testing.assert_allclose(np.diff(greedy.levels)[:3], 0.1)


def test_separate_groups_change_nothing():
    assert ModelShape(SHAPE.in_features, SHAPE.out_features).groups == SEPARATE
    raw = np.random.default_rng(0).uniform(0, 1, (2, 7))
    np.testing.assert_array_equal(SHAPE.with_masks("separate").tie(raw), raw)
    np.testing.assert_array_equal(SHAPE.with_masks("separate").divided(raw), raw)


def test_tie_keeps_the_models_sparsity_and_divided_the_sums():
    raw = np.random.default_rng(0).uniform(0, 1, (2, 7))
    assert is_tied(SHAPE.tie(raw))
    assert SHAPE.sparsity(SHAPE.tie(raw)) == pytest.approx(SHAPE.sparsity(raw), abs=1e-14)
    np.testing.assert_array_equal(SHAPE.tie(SHAPE.tie(raw)), SHAPE.tie(raw))
    firsts = np.zeros((2, 7, 5))
    firsts[:, [0, 3, 4, 6]] = np.random.default_rng(1).uniform(0, 1, (2, 4, 5))
    parts = SHAPE.divided(firsts)
    for group in SHARED:
        np.testing.assert_allclose(parts[:, list(group)].sum(axis=1), firsts[:, group[0]])
    np.testing.assert_allclose(parts[:, 0] / SHAPE.params[:, 0, None], parts[:, 2] / SHAPE.params[:, 2, None])


def test_a_shape_says_its_masks():
    for shape in (SHAPE, SHAPE.with_masks("separate")):
        assert shape.to_json()["masks"] == shape.masks
        assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    with pytest.raises(ModelError, match="masks: must be one of separate, shared, got 'one'"):
        ModelShape(SHAPE.in_features, SHAPE.out_features, "one")
    with pytest.raises(ModelError, match="block 0: gate, up have inputs of different widths and cannot share a mask"):
        ModelShape(((8, 8, 8, 8, 8, 9, 8),), ((8,) * 7,), "shared")


def seeds(target: float) -> list[Seed]:
    prices = np.random.default_rng(0).exponential(1, (2, 7, 1)) * DEFAULT_GRID**2
    fisher = fisher_seed(SHAPE.divided(prices), DEFAULT_GRID, SparsityBudget(SHAPE, target))
    other = np.random.default_rng(1).uniform(0.1, 0.9, (2, 7))  # of a study with separate masks
    warm = point_seed("warm", retarget(other, SparsityBudget(SHAPE, target)), SHAPE)
    return [*baseline_seeds(SparsityBudget(SHAPE, target), fisher.table), warm, fisher]


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_every_seed_and_every_vector_of_every_space_is_tied_and_meets_the_budget(target):
    for seed in seeds(target):
        assert is_tied(seed.sparsities)
        assert SHAPE.sparsity(seed.sparsities) == pytest.approx(target, abs=1e-12)
    seed = seeds(target)[-1]
    rng = np.random.default_rng(0)
    for name in SPACES:
        space = make_space(name, seed, SparsityBudget(SHAPE, target), 0.1)
        for _ in range(20):
            params = {key: float(rng.uniform(d.low, d.high)) for key, d in space.distributions.items()}
            sparsities = space.sparsities(params)
            assert is_tied(sparsities), name
            assert SHAPE.sparsity(sparsities) == pytest.approx(target, abs=1e-12)
            np.testing.assert_allclose(SHAPE.levels(sparsities), space.levels(params), atol=1e-12)
        np.testing.assert_allclose(space.sparsities(space.centre), seed.sparsities, atol=1e-9)


def test_groups_have_one_parameter():
    seed = seeds(0.6)[-1]
    full = make_space("full", seed, BUDGET, 0.1)
    assert list(full.distributions)[:4] == ["block_0_0_q_k_v", "block_0_3_o", "block_0_4_gate_up", "block_0_6_down"]
    kinds = [name for name in make_space("additive", seed, BUDGET, 0.1).distributions if "kind" in name]
    assert kinds == ["kind_0_q_k_v", "kind_3_o", "kind_4_gate_up", "kind_6_down"]


def test_a_descent_stays_tied_and_ends_where_a_parameter_of_any_group_costs_the_same():
    curvature = np.random.default_rng(0).uniform(0.5, 4, (2, 4))

    def slopes(point: np.ndarray) -> np.ndarray:
        assert is_tied(point)
        firsts = np.zeros((2, 7))
        firsts[:, [0, 3, 4, 6]] = curvature * point[:, [0, 3, 4, 6]]
        weights = np.stack([SHAPE.params[:, list(g)].sum(axis=1) for g in SHARED], axis=1) / SHAPE.params.sum()
        firsts[:, [0, 3, 4, 6]] *= weights
        return SHAPE.divided(firsts)

    options = DescentOptions(rounds=300, step=0.02, last_step=0.01)
    found = descend(slopes, np.full((2, 7), 0.5), SparsityBudget(SHAPE, 0.5), options)
    assert is_tied(found)
    assert SHAPE.sparsity(found) == pytest.approx(0.5, abs=1e-12)
    cost = curvature * found[:, [0, 3, 4, 6]]  # the slope of one parameter: the same everywhere but at a bound
    inside = found[:, [0, 3, 4, 6]] < 0.979
    assert np.ptp(cost[inside]) < 0.02


def make_plan(**changes) -> Plan:
    rng = np.random.default_rng(0)
    norms = tuple(
        tuple(row[group[0]] for group in SHARED for _ in group)
        for row in [[rng.uniform(0, 1, w).astype(np.float32) for w in widths] for widths in SHAPE.in_features]
    )
    values = {
        "model": "ada/tiny",
        "revision": "main",
        "fingerprint": "f" * 64,
        "shape": SHAPE,
        "score": "l2",
        "budget": 0.6,
        "dense_prefix": 1,
        "sparsities": tied(rng.uniform(0, 0.9, (2, 7))),
        "thresholds": tied(rng.uniform(0, 2, (2, 7)).astype(np.float32)),
        "norms": norms,
    }
    return Plan(**{**values, **changes})


def test_a_plan_records_its_masks(tmp_path):
    plan = make_plan()
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded.shape == SHAPE
    assert loaded.shape.masks == "shared"
    assert json.loads((tmp_path / "plan" / JSON_NAME).read_text())["shape"]["masks"] == "shared"


def test_a_plan_of_shared_masks_that_differ_is_refused():
    plan = make_plan()
    for name in ("sparsities", "thresholds"):
        values = getattr(plan, name).copy()
        values[1, 5] += np.float32(0.01)
        with pytest.raises(PlanError, match="block 1: gate and up share a mask, so their sparsities, thresholds and"):
            dataclasses.replace(plan, **{name: values})
    other = list(map(list, plan.norms))
    other[0][2] = other[0][2] + np.float32(1.0)
    with pytest.raises(PlanError, match="block 0: q and v share a mask"):
        dataclasses.replace(plan, norms=tuple(map(tuple, other)))
    separate = make_plan(shape=SHAPE.with_masks("separate"), norms=tuple(map(tuple, other)))
    with pytest.raises(PlanError, match="plan with separate masks, the model's are shared"):
        separate.require_shape(SHAPE)
