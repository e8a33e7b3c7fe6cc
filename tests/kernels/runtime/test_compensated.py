"""Plans with a compensation on every path that decodes, beside float64: hooks that correct masked tokens alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.random_models import compensated
from tests.doubles.tiny_models import (
    FUSED_FAMILIES,
    logits_of_steps,
    masked_logits,
    model_of,
    tiny_model,
    tiny_plan,
    tokens_of,
)
from tests.kernels.products import WAYS, take
from was_kernels.runtime.decoding_loop import DecodingLoop
from was_kernels.runtime.positions import DensePrefix
from was_kernels.runtime.sparse_linear import SparseLinear
from was_kernels.runtime.sparse_model import sparsify
from was_search.checkpoints.quantised import quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.plan import Plan
from was_search.weight_format import WeightFormat

PROMPT = 8


@pytest.fixture(params=WAYS)
def choice(request, monkeypatch):
    """Which product is taken on a CPU, whatever is faster."""
    take(request.param, monkeypatch)


def exact(model: Any, plan: Plan, tokens: Tensor, masked: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits in float64 of whole sequences, of which the flagged tokens are masked and corrected.

    Args:
        model: dense.
        plan: with a compensation.
        tokens: [B, n].
        masked: bool [B, n].
        mask: of tokens, [B, n]: padding on the left.
    """
    model, rows = copy.deepcopy(model).double(), masked[..., None]
    given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    assert plan.compensation is not None
    for one in find_structure(model, plan.shape.masks).inputs():
        b, p = one.block, one.members[0]
        norms, threshold = torch.tensor(plan.norms[b][p]).to(tokens.device), float(plan.thresholds[b, p])
        fused = len(one.linears) < len(one.members)

        def before(_: nn.Module, args: Any, norms: Tensor = norms, threshold: float = threshold) -> Any:
            return (torch.where((args[0].abs().float() * norms >= threshold) | ~rows, args[0], 0.0),)

        for i, linear in enumerate(one.linears):
            members = one.members if fused else one.members[i : i + 1]
            scale, constant = (
                torch.cat([torch.tensor(row[b][m]) for m in members]).double().to(tokens.device)
                for row in (plan.compensation.scales, plan.compensation.constants)
            )

            def after(_: nn.Module, __: Any, y: Tensor, scale: Tensor = scale, constant: Tensor = constant) -> Tensor:
                return torch.where(rows, scale * y + constant, y)

            linear.register_forward_pre_hook(before)
            linear.register_forward_hook(after)
    with torch.inference_mode():
        logits: Tensor = model(tokens, use_cache=False, **given).logits
    return logits


def masked_tokens(plan: Plan, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which tokens the runtime masks: those after the dense prefix, and after the prompt if that is dense."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    positions = places if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    return (positions >= plan.dense_prefix) & ((places >= PROMPT) | (plan.prefill == "masked"))


def of_steps(logits: Tensor) -> Tensor:
    """As :func:`logits_of_steps` gives them."""
    return logits[:, PROMPT:].transpose(0, 1)


def close(found: Tensor, expected: Tensor) -> None:
    """The vectors, and sums in other orders, are float32; a flipped mask would show as 1e-2, no correction as 0.1."""
    tolerance = 1e-5 if found.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.8])
@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("dense_prompts", [False, True])
def test_a_linear_map(dtype, bias, threshold, cpu, dense_prompts, choice):
    """Steps of one row and several, prompts, and steps of too many rows; some tokens in the dense prefix."""
    torch.manual_seed(0)
    linear = nn.Linear(72, 48, bias=bias).to(dtype)
    weight, own = linear.weight.detach().double(), linear.bias.detach().double() if bias else torch.zeros(48).double()
    norms, scale, constant = torch.rand(72) + 0.5, 1.0 + torch.randn(48) / 8, torch.randn(48) / 4
    prefix = DensePrefix(2)
    how = {"prefix": prefix, "triton": False, "dense_prompts": dense_prompts, "dense_above": 4}
    held = SparseLinear(linear, norms, threshold, cpu=cpu, compensation=(scale, constant), **how)
    for shape, places in (
        ((1, 1), [[5]]),
        ((1, 1), [[1]]),
        ((4, 1), [[1], [2], [0], [7]]),
        ((5, 1), [[1], [2], [0], [7], [8]]),  # more than dense_above
        ((2, 6), [[0, 1, 2, 3, 4, 5]] * 2),
    ):
        x = torch.randn(*shape, 72).to(dtype)
        positions = torch.tensor(places)
        prefix.begin({"inputs_embeds": x, "position_ids": positions})
        with torch.inference_mode():
            found = held(x)
        prefix.end()
        masked = (positions >= 2) & (shape[1] == 1 or not dense_prompts) & (shape != (5, 1))
        kept = torch.where((x.abs().float() * norms >= threshold) | ~masked[..., None], x, 0.0).double()
        plain = kept @ weight.T + own
        expected = torch.where(masked[..., None], scale.double() * plain + constant.double(), plain)
        unit = max(torch.finfo(dtype).eps, 1e-6)
        assert found.dtype == dtype and found.shape == (*shape, 48)
        torch.testing.assert_close(found.double(), expected, rtol=2 * unit, atol=2 * unit)


FAMILIES = {
    "llama": lambda dtype: tiny_model("llama", dtype),  # with biases
    "qwen3": lambda dtype: tiny_model("qwen3", dtype),
    "gemma2": lambda dtype: tiny_model("gemma2", dtype),
    **{family: lambda dtype, family=family: tiny_model(family, dtype) for family in FUSED_FAMILIES},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_the_reference(family, prefill):
    model = FAMILIES[family](torch.float64)
    plan = compensated(tiny_plan(model, masks="shared" if family in FUSED_FAMILIES else "separate"))
    plan = dataclasses.replace(plan, prefill=prefill, dense_prefix=3)
    tokens = tokens_of(2, 14)
    masked = masked_tokens(plan, tokens)
    with sparsify(model, plan, backend="reference") as sparse, torch.inference_mode():
        prompt = sparse(tokens[:, :PROMPT]).logits
        steps = logits_of_steps(sparse, tokens, PROMPT)
    expected = exact(model, plan, tokens, masked)
    close(prompt, expected[:, :PROMPT])
    close(steps, of_steps(expected))
    if prefill == "masked":
        close(masked_logits(model, plan, tokens), expected)  # a search's own passes
        without = masked_logits(model, dataclasses.replace(plan, compensation=None), tokens)
        assert (expected - without).abs().mean() > 0.1  # it matters
    else:
        with torch.inference_mode():
            assert torch.equal(prompt, model(tokens[:, :PROMPT]).logits)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
@pytest.mark.parametrize(("prefill", "padded", "masks"), [("masked", True, "separate"), ("dense", False, "shared")])
def test_steps_on_a_cpu(family, prefill, padded, masks, choice):
    model = model_of(family, "cpu", torch.float32)
    plan = dataclasses.replace(compensated(tiny_plan(model, masks=masks)), prefill=prefill, dense_prefix=7)
    for rows in (1, 3):
        tokens = tokens_of(rows, 14)
        mask = torch.ones_like(tokens) if padded else None
        if mask is not None and rows > 1:
            mask[0, :4] = 0  # its first steps lie in the dense prefix, beside others that do not
        with sparsify(model, plan, backend="cpu") as sparse:
            found = logits_of_steps(sparse, tokens, PROMPT, mask)
        close(found, of_steps(exact(model, plan, tokens, masked_tokens(plan, tokens, mask), mask)))


@pytest.mark.parametrize("family", ["llama-bias", "qwen3"])
@pytest.mark.parametrize(("batch", "prefill"), [(1, "masked"), (3, "dense")])
def test_fused_steps(family, batch, prefill, op_device, dtype):
    """On a GPU in half precision, where channels change sides of their threshold: nearer than without a correction."""
    model = model_of(family, op_device, dtype)
    plan = dataclasses.replace(compensated(tiny_plan(model)), prefill=prefill, dense_prefix=10)
    tokens = tokens_of(batch, 16).to(op_device)
    for graphs in (False, True):
        handle = sparsify(model, plan, backend="cuda", graphs=graphs)
        assert handle.fused == 2
        with handle:
            found = logits_of_steps(model, tokens, PROMPT)
    expected = of_steps(exact(model, plan, tokens, masked_tokens(plan, tokens)))
    if op_device == "cpu":
        close(found, expected)
        return
    with sparsify(model, dataclasses.replace(plan, compensation=None), backend="cuda") as sparse:
        without = logits_of_steps(sparse, tokens, PROMPT)
    error, distance = ((each - expected).abs()[2:].mean() for each in (found, without))  # two lie in the prefix
    assert error < 0.5 * distance  # it would be 1 if nothing were corrected; seen on an H200: up to 0.37


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights(bits):
    model = model_of("qwen2", "cpu", torch.float32)
    quantise_projections(find_structure(model), WeightFormat(bits, 64))
    plan = compensated(tiny_plan(model))
    tokens = tokens_of(2, 12)
    with sparsify(model, plan) as sparse:
        found = logits_of_steps(sparse, tokens, PROMPT)
    close(found, of_steps(exact(model, plan, tokens, masked_tokens(plan, tokens))))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps_of_too_many_rows_are_dense(backend):
    model = model_of("qwen2", "cpu", torch.float32)
    plan = compensated(tiny_plan(model))
    tokens = tokens_of(3, 12)
    for above in (2, 3):
        masked = masked_tokens(plan, tokens)
        masked[:, PROMPT:] &= above == 3
        with sparsify(model, plan, backend=backend, dense_above=above) as sparse:
            found = logits_of_steps(sparse, tokens, PROMPT)
        close(found, of_steps(exact(model, plan, tokens, masked)))


def test_the_decoding_loop(op_device, dtype):
    """Its texts are the likeliest tokens of float64; on a GPU, in half precision, those of steps without a graph."""
    model = model_of("llama", op_device, dtype)
    plan = compensated(tiny_plan(model))
    tokens = tokens_of(2, PROMPT).to(op_device)
    handle = sparsify(model, plan)
    found = torch.tensor(list(handle.stream(tokens, max_new_tokens=10))).T.to(op_device)
    handle.restore()
    if op_device == "cuda":
        with sparsify(model, plan) as sparse:
            without = list(DecodingLoop(sparse, graphs=False).stream(tokens, max_new_tokens=10))
        assert torch.equal(torch.tensor(without).T.to(op_device), found)
        return
    text = torch.cat((tokens, found), dim=1)
    logits = exact(model, plan, text, masked_tokens(plan, text))
    assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), found)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_model_is_as_it_was_afterwards(backend):
    model = model_of("qwen2", "cpu", torch.bfloat16)
    tokens = tokens_of(2, 12)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = logits_of_steps(model, tokens, PROMPT)
    with sparsify(model, compensated(tiny_plan(model)), backend=backend) as sparse:
        assert not torch.equal(logits_of_steps(sparse, tokens, PROMPT), dense)
        assert set(sparse.state_dict()) == set(state)  # the vectors are the plan's
    assert torch.equal(logits_of_steps(model, tokens, PROMPT), dense)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(list(model.buffers())) == len(list(model_of("qwen2", "cpu", torch.bfloat16).buffers()))


def test_torch_compile():
    linear = nn.Linear(72, 48)
    vectors = 1.0 + torch.randn(48) / 8, torch.randn(48) / 4
    held = SparseLinear(linear, torch.rand(72) + 0.5, 0.8, prefix=None, triton=False, cpu=True, compensation=vectors)
    compiled = torch.compile(held, backend="eager", fullgraph=True)
    for shape in ((1, 1, 72), (2, 6, 72)):
        x = torch.randn(shape)
        with torch.inference_mode():
            kept = torch.where(x.abs() * held.norms >= 0.8, x, 0.0)
            expected = vectors[0] * F.linear(kept, linear.weight, linear.bias) + vectors[1]
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_of_fused_steps(op_device, dtype):
    model = model_of("qwen2", op_device, dtype)
    tokens = tokens_of(1, 12).to(op_device)
    with sparsify(model, compensated(tiny_plan(model)), backend="cuda", graphs=False) as sparse:
        expected = logits_of_steps(sparse, tokens, PROMPT)
        compiled = torch.compile(sparse.forward, fullgraph=True, backend="eager")
        found = logits_of_steps(sparse, tokens, PROMPT, forward=compiled)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 if op_device == "cuda" else 1e-4)
