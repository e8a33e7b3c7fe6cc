"""The runtime with the plain backend, in float64: equal to the dense model under masking hooks to 1e-9.

The order of float64 sums moves a logit by about 1e-14; a mask that differs in one channel moves it by 1e-3.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from tests.doubles.tiny_models import FAMILIES, FUSED_FAMILIES, masked_logits, plan_apart, tiny_model, tiny_plan
from was_kernels.ops.gather_launch import new_workspace
from was_kernels.runtime import sparse_model
from was_kernels.runtime.sparse_linear import SparseLinear
from was_kernels.runtime.sparse_model import sparsify
from was_search.checkpoints.structure import find_structure
from was_search.errors import ConfigError, ModelError, PlanError, ResourceError
from was_search.masks.score import masked

CLOSE = {"rtol": 0.0, "atol": 1e-9}


def random_tokens(batch: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def bits(model: nn.Module) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (t.stride(), t.detach().contiguous().numpy().tobytes()) for name, t in model.state_dict().items()}


def greedy_by_recomputing(model: nn.Module, plan, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    tokens = prompt
    for _ in range(steps):
        tokens = torch.cat([tokens, masked_logits(model, plan, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


CASES = [
    *((family, "separate") for family in FAMILIES),
    *((family, "shared") for family in ("llama", "qwen3", *FUSED_FAMILIES)),
]


@pytest.mark.parametrize(("family", "masks"), CASES)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_prefill_equals_the_masked_model(family, masks, prefix):
    model = tiny_model(family)
    plan = tiny_plan(model, dense_prefix=prefix, masks=masks)
    tokens = random_tokens(2, 12)
    expected = masked_logits(model, plan, tokens)
    with torch.inference_mode():
        dense = model(tokens).logits
        with sparsify(model, plan) as sparse:
            found = sparse(tokens).logits
        after = model(tokens).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(found[:, :prefix], dense[:, :prefix], **CLOSE)
    assert (found[:, prefix:] - dense[:, prefix:]).abs().max() > 1e-2  # the mask does something
    assert torch.equal(after, dense)


@pytest.mark.parametrize(("family", "masks"), CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_steps_equal_prefill(family, masks, batch):
    model = tiny_model(family)
    tokens = random_tokens(batch, 11)
    plan = plan_apart(model, tiny_plan(model, dense_prefix=2, masks=masks), tokens)
    expected = masked_logits(model, plan, tokens)
    for prompt in (1, 4):
        with torch.inference_mode(), sparsify(model, plan):
            step = model(tokens[:, :prompt], use_cache=True)
            found = [step.logits]
            for t in range(prompt, 11):
                step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
                found.append(step.logits)
        # transformers' Gemma 2 takes norms in float32, whatever the model's dtype.
        close = {"rtol": 0.0, "atol": 1e-5} if family == "gemma2" else CLOSE
        torch.testing.assert_close(torch.cat(found, dim=1), expected, **close)


@pytest.mark.parametrize(
    ("batch", "dense_above", "is_dense"), [(3, 2, True), (3, 3, False), (17, None, False), (17, 16, True)]
)
def test_steps_of_many_rows_keep_every_channel(batch, dense_above, is_dense):
    model = tiny_model()
    plan = tiny_plan(model, dense_prefix=2)
    tokens = random_tokens(batch, 7)
    with torch.inference_mode(), sparsify(model, plan, dense_above=dense_above) as sparse:
        prompt = sparse(tokens[:, :6], use_cache=True)
        found = sparse(tokens[:, 6:], past_key_values=copy.deepcopy(prompt.past_key_values)).logits
    with torch.inference_mode():
        dense = model(tokens[:, 6:], past_key_values=prompt.past_key_values).logits
    expected = masked_logits(model, plan, tokens)
    torch.testing.assert_close(prompt.logits, expected[:, :6], **CLOSE)  # prompts are masked all the same
    torch.testing.assert_close(found, dense if is_dense else expected[:, 6:], **CLOSE)
    assert (dense - expected[:, 6:]).abs().max() > 1e-2


def test_no_channel_counts_as_dropped_in_steps_of_many_rows():
    model = tiny_model()
    tokens = random_tokens(3, 2)
    handle = sparsify(model, tiny_plan(model, dense_prefix=0), dense_above=2)
    with torch.inference_mode(), handle.counting() as counts:
        handle.model(tokens[:, :1])
    assert counts.tokens == 3
    assert counts.sparsity() == 0.0


def test_dense_above_is_at_least_one():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"dense_above: must be at least 1, or None, got 0"):
        sparsify(model, tiny_plan(model), dense_above=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prompt_length", [1, 6])
def test_generate_equals_recomputing(cache, batch, prompt_length):
    model = tiny_model()
    plan = tiny_plan(model, dense_prefix=2)
    prompt = random_tokens(batch, prompt_length)
    expected = greedy_by_recomputing(model, plan, prompt, 10)
    with sparsify(model, plan) as sparse:
        found = sparse.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=10,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_left_padding(cache):
    model = tiny_model()
    plan = tiny_plan(model, dense_prefix=2, sparsity=0.7)
    short, long = random_tokens(1, 3, seed=8), random_tokens(1, 7, seed=9)
    expected = [greedy_by_recomputing(model, plan, prompt, 8)[0, -8:] for prompt in (short, long)]
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    with sparsify(model, plan) as sparse:
        found = sparse.generate(
            batch,
            attention_mask=(batch != 0).long(),
            max_new_tokens=8,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )
    assert torch.equal(found[:, -8:], torch.stack(expected))


def test_counting_sees_the_one_token_steps():
    model = tiny_model()
    plan = tiny_plan(model, sparsity=0.6)
    tokens = random_tokens(2, 9)
    # An independent count: inputs of the dense model's projections under masking, at the decoded positions.
    kept = np.zeros((2, 7))
    structure = find_structure(model)
    handles = []
    for b, p, linear in structure.linears():

        def hook(_, args, b=b, p=p):
            x = args[0]
            threshold = float(plan.thresholds[b, p])
            y = masked(x, torch.tensor(plan.norms[b][p]), threshold)
            y[:, :1] = x[:, :1]
            kept[b, p] = float((y[:, 4:] != 0).double().mean()) if threshold > 0 else 1.0
            return (y,)

        handles.append(linear.register_forward_pre_hook(hook))
    with torch.inference_mode():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()

    handle = sparsify(model, plan)
    with torch.inference_mode(), handle.counting() as counts:
        step = model(tokens[:, :4], use_cache=True)
        assert counts.tokens == 0
        for t in range(4, 9):
            step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
    model(tokens[:, :1])  # outside: not counted
    assert counts.tokens == 2 * 5
    np.testing.assert_allclose(counts.achieved(), 1.0 - kept, atol=1e-12)
    assert counts.achieved()[0, 2] == 0.0
    assert counts.sparsity() == pytest.approx(handle.shape.sparsity(1.0 - kept))
    assert 0.4 < counts.sparsity() < 0.75
    handle.restore()
    with pytest.raises(ConfigError, match="no longer applied"), handle.counting():
        pass


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_fused_maps_are_swapped_counted_and_given_back(family):
    model = tiny_model(family)
    plan = tiny_plan(model, sparsity=0.6, masks="shared")
    before = bits(model)
    with pytest.raises(ModelError, match=rf"model_type {family}\) has fused maps .*give --masks shared"):
        tiny_plan(model)
    handle = sparsify(model, plan)
    assert isinstance(model.model.layers[1].mlp.gate_up_proj, SparseLinear)
    assert len(handle.projections) == (8 if family == "phi3" else 12)
    with torch.inference_mode(), handle.counting() as counts:
        step = model(random_tokens(1, 4), use_cache=True)
        for t in range(6):
            step = model(random_tokens(1, 6)[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
    assert counts.tokens == 6
    achieved = counts.achieved()
    np.testing.assert_array_equal(achieved[:, 5], achieved[:, 4])
    if family == "phi3":
        np.testing.assert_array_equal(achieved[:, 2], achieved[:, 0])
    assert not achieved[0, :3].any()
    assert achieved[1].min() > 0.4 and achieved[1].max() < 0.8
    handle.restore()
    assert bits(model) == before


@pytest.fixture
def own_objects() -> Iterator[None]:
    """``gc.get_objects`` shows only what is made from here on: earlier tests leave millions."""
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Of the storages of all tensors that ``own_objects`` lets Python see."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("family", "masks"), [("llama", "separate"), ("phi3", "shared"), ("llama", "shared")])
def test_a_weights_old_layout_is_freed_before_the_next_is_made(family, masks, monkeypatch, own_objects):
    model = tiny_model(family)
    plan = tiny_plan(model, masks=masks)
    found = []

    class Watched(SparseLinear):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            found.append(live_bytes())

    monkeypatch.setattr(sparse_model, "SparseLinear", Watched)
    before = live_bytes()
    with sparsify(model, plan):
        assert len(found) == (8 if family == "phi3" else 14)
    norms = sum(4 * width for row in plan.shape.in_features for width in row)
    # A weight held back would be 18 KB or more; the loop's own tensors are smaller.
    assert max(found) <= before + norms + 4096


def test_counting_leaves_the_dense_prefix_out():
    model = tiny_model()
    handle = sparsify(model, tiny_plan(model, dense_prefix=2))
    with torch.inference_mode(), handle.counting() as counts:
        step = None
        for t in range(5):
            cache = None if step is None else step.past_key_values
            step = model(random_tokens(1, 5)[:, t : t + 1], past_key_values=cache, use_cache=True)
    assert counts.tokens == 3
    handle.restore()


def test_restore_is_bit_identical_and_keeps_the_parameters():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    plan = tiny_plan(model)
    model.to(torch.float32)
    before, identities = bits(model), {name: id(p) for name, p in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    handle = sparsify(model, plan)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 14
    handle.restore()
    handle.restore()
    assert bits(model) == before
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks


def test_the_weight_is_held_once_and_column_major():
    model = tiny_model("qwen2")
    weight = model.model.layers[0].mlp.down_proj.weight
    values = weight.detach().clone()
    with sparsify(model, tiny_plan(model)):
        sparse = model.model.layers[0].mlp.down_proj
        assert sparse.weight is weight
        columns = sparse.held.columns.columns
        assert columns.is_contiguous() and columns.data_ptr() == weight.data_ptr()
        assert tuple(columns.shape) == (sparse.in_features, sparse.out_features) == (80, 48)
        assert torch.equal(sparse.weight, values)
        assert weight.untyped_storage().nbytes() == values.untyped_storage().nbytes()
        assert "down_proj): SparseLinear(in_features=80" in repr(model)
    assert weight.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "counted", "triton", "kernels"),
    [
        (torch.float16, True, True, "cuda"),
        (torch.float32, True, True, "triton"),  # no CUDA kernel takes it, whatever the model's other projections do
        (torch.float16, False, True, "triton"),
        (torch.float16, False, False, "reference"),
    ],
)
def test_a_projection_shows_the_kernels_that_it_uses(dtype, counted, triton, kernels):
    given = new_workspace(torch.device("cpu")) if counted else None
    linear = nn.Linear(64, 64, dtype=dtype)
    found = SparseLinear(linear, torch.ones(64), 0.3, prefix=None, triton=triton, workspace=given)
    assert repr(found).endswith(f"threshold=0.3, {kernels})")


def test_restores_on_exception():
    model = tiny_model()
    before = bits(model)
    with pytest.raises(RuntimeError, match="stop"), sparsify(model, tiny_plan(model)):
        raise RuntimeError("stop")
    assert bits(model) == before
    assert not any(isinstance(m, SparseLinear) for m in model.modules())


def test_a_failure_half_way_undoes_the_swaps(monkeypatch):

    model = tiny_model()
    plan, before, calls = tiny_plan(model), bits(model), []

    def failing(values, linear):
        calls.append(linear)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values

    monkeypatch.setattr(sparse_model, "norms_like", failing)
    with pytest.raises(torch.OutOfMemoryError):
        sparsify(model, plan)
    assert bits(model) == before
    find_structure(model)
    assert not model.model._forward_pre_hooks


def test_a_failed_forward_leaves_no_flags():
    model = tiny_model()
    plan = tiny_plan(model, sparsity=0.7)
    with torch.inference_mode(), sparsify(model, plan):
        with pytest.raises(IndexError):
            model(torch.full((1, 4), 10_000))
        found = model.model.layers[0].mlp.up_proj(torch.ones(3, 48, dtype=torch.float64))
    assert found.shape == (3, 80)


def test_attention_mask_without_position_ids():
    # The decoder then counts padding in its rotary positions; the dense prefix starts at the first real token.
    model = tiny_model()
    plan = tiny_plan(model, sparsity=0.7)
    tokens = random_tokens(1, 8)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.inference_mode():
        with sparsify(model, plan) as sparse:
            found = sparse(tokens, attention_mask=mask).logits
        dense = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[:, 3], dense[:, 3], **CLOSE)
    assert (found[:, 4:] - dense[:, 4:]).abs().amax(dim=-1).min() > 1e-4


def test_another_models_plan_is_refused():
    model, other = tiny_model("llama"), tiny_model("qwen3")
    plan = tiny_plan(other)
    with pytest.raises(PlanError, match=r"block 0, q: plan for a \(64, 48\) weight, the model has \(48, 48\)"):
        sparsify(model, plan)
    with pytest.raises(PlanError, match=rf"belongs to another model: plan tiny {'f' * 64}, model at hand {'e' * 64}"):
        sparsify(other, plan, fingerprint="e" * 64)
    with sparsify(other, plan, fingerprint="f" * 64):
        pass


def test_sparsifying_twice_is_refused():
    model = tiny_model()
    plan = tiny_plan(model)
    with sparsify(model, plan), pytest.raises(PlanError, match="runs a plan already; call restore"):
        sparsify(model, plan)
    with sparsify(model, plan):
        pass


def test_backends_and_models_that_cannot_run_are_refused():
    model = tiny_model()
    plan = tiny_plan(model)
    with pytest.raises(ConfigError, match="backend: must be auto, cuda, triton, cpu or reference, got 'fast'"):
        sparsify(model, plan, backend="fast")
    with pytest.raises(ConfigError, match="backend: cuda takes float16 and bfloat16"):
        sparsify(model, plan, backend="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"backend triton: .*use backend auto or reference"):
            sparsify(model.float(), plan, backend="triton")
        with pytest.raises(ResourceError, match=r"backend cuda: no CUDA device; use backend auto or reference"):
            sparsify(model.half(), plan, backend="cuda")
    shared = copy.deepcopy(model)
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="share one weight"):
        sparsify(shared, plan)
    with pytest.raises(ModelError, match="meta device"):
        sparsify(copy.deepcopy(model).to("meta"), plan)
    assert sparsify(model, plan).backend == "cpu"


def test_a_bare_decoder_runs_a_plan():
    model = tiny_model()
    plan = tiny_plan(model)
    tokens = random_tokens(2, 6)
    with torch.inference_mode():
        with sparsify(model, plan):
            expected = model.model(tokens).last_hidden_state
        with sparsify(model.model, plan) as sparse:
            found = sparse(tokens).last_hidden_state
    assert torch.equal(found, expected)


def test_a_dense_plan_changes_nothing():
    model = tiny_model("qwen2", dtype=torch.float32)
    plan = tiny_plan(model)
    plan = dataclasses.replace(plan, thresholds=np.zeros_like(plan.thresholds), sparsities=0.0 * plan.sparsities)
    tokens = random_tokens(2, 6)
    with torch.inference_mode():
        dense = model(tokens).logits
        with sparsify(model, plan):
            found = model(tokens).logits
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)  # float32 products in another memory order


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    model = tiny_model()
    plan = tiny_plan(model)
    tokens = random_tokens(1, 6)
    with torch.inference_mode(), sparsify(model, plan):
        expected = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_plan_may_leave_prompts_dense():
    model = tiny_model()
    plan = tiny_plan(model)
    tokens = random_tokens(1, 9)
    with torch.inference_mode():
        dense = model(tokens).logits
        cache = model(tokens[:, :8], use_cache=True)
        with sparsify(model, dataclasses.replace(plan, prefill="dense")) as sparse:
            prompt = sparse(tokens[:, :8], use_cache=True)
            step = sparse(tokens[:, 8:], past_key_values=prompt.past_key_values).logits
        with sparsify(model, plan) as sparse:
            masked_step = sparse(tokens[:, 8:], past_key_values=cache.past_key_values).logits
    torch.testing.assert_close(prompt.logits, dense[:, :8], **CLOSE)
    torch.testing.assert_close(step, masked_step, **CLOSE)
    assert (step - dense[:, 8:]).abs().max() > 1e-2
