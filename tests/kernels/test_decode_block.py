"""Fused one-token steps of whole models: against the same plan on the plain path, greedy tokens and logits.

On CPU the fused ops are plain torch in the model's dtype: float32 there, so that hardly a mask differs. On a GPU the
kernels run, in half precision.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from tests.kernels.tiny_models import WIDER, tiny_plan
from was_kernels import decode_block, decode_model, runtime
from was_kernels.runtime import sparsify
from was_search.errors import ConfigError

FAMILIES = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**size)),
    "llama-32": lambda size: LlamaForCausalLM(LlamaConfig(**size, head_dim=32)),
    "llama-bias": lambda size: LlamaForCausalLM(LlamaConfig(**size, attention_bias=True, mlp_bias=True)),
    "mistral": lambda size: MistralForCausalLM(MistralConfig(**size, head_dim=128, sliding_window=None)),
    "qwen2": lambda size: Qwen2ForCausalLM(Qwen2Config(**size)),
    "qwen3": lambda size: Qwen3ForCausalLM(Qwen3Config(**size, head_dim=64)),
}


def model_of(family: str, device: str, dtype: torch.dtype, **sizes: int) -> Any:
    torch.manual_seed(3)
    model = FAMILIES[family]({**WIDER, **sizes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.2 if "bias" in name else 0.08))
    return model.to(device, dtype)


@pytest.fixture
def dtype(op_device: str, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The model's; on CPU the fused path is let in for float32."""
    if op_device == "cuda":
        return torch.bfloat16
    for module in (decode_block, decode_model):
        monkeypatch.setattr(module, "HALF", (torch.float32,))
    monkeypatch.setattr(runtime, "_choose_backend", lambda backend, _: "cuda" if backend == "cuda" else "reference")
    return torch.float32


def tokens_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(5))


def logits_of_steps(model: Any, tokens: torch.Tensor, prompt: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the tokens behind the prompt, one by one over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 9)
    found = []
    with torch.inference_mode():
        for first, last in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]:
            given = {} if mask is None else {"attention_mask": mask[:, :last]}
            if mask is not None:
                given["position_ids"] = (mask[:, :last].cumsum(-1) - 1).clamp(min=0)[:, first:]
            found.append(model(tokens[:, first:last], past_key_values=cache, use_cache=True, **given).logits[:, -1])
    return torch.stack(found[1:])


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    step = decode_block.DecodeBlock.step

    def counted(self: Any, x: torch.Tensor, *others: Any) -> Any:
        taken.append(x.shape[0])
        return step(self, x, *others)

    monkeypatch.setattr(decode_block.DecodeBlock, "step", counted)
    return taken


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_steps_equal_the_plain_path(family, batch, op_device, dtype, monkeypatch):
    model = model_of(family, op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(batch, 20).to(op_device)
    taken = steps_taken(monkeypatch)
    with sparsify(copy.deepcopy(model).double(), plan, backend="reference") as exact:
        expected = logits_of_steps(exact, tokens, 8)
    with sparsify(model, plan, backend="reference") as sparse:
        plain = logits_of_steps(sparse, tokens, 8)
    assert not taken
    handle = sparsify(model, plan, backend="cuda")
    assert handle.fused == 2
    found = logits_of_steps(model, tokens, 8)
    assert taken == [batch] * 24
    handle.restore()
    assert type(model.model.layers[0]).__mro__[1].__name__ == "GradientCheckpointingLayer"
    # In half precision channels change sides of their threshold, on the plain path as well.
    error, usual = ((x - expected).abs() for x in (found, plain))
    assert error.mean() < 1.2 * usual.mean() + 1e-6
    assert error.max() < 2.0 * usual.max() + 1e-3


@pytest.mark.parametrize("one_list", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_shared_masks(family, batch, one_list, op_device, dtype, monkeypatch):
    """As with separate masks; with one list the weights lie side by side, and come back as they were."""
    model = model_of(family, op_device, dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = tiny_plan(model, masks="shared")
    tokens = tokens_of(batch, 16).to(op_device)
    with sparsify(copy.deepcopy(model).double(), plan, backend="reference") as exact:
        expected = logits_of_steps(exact, tokens, 8)
    with sparsify(model, plan, backend="reference") as sparse:
        plain = logits_of_steps(sparse, tokens, 8)
    taken = steps_taken(monkeypatch)
    handle = sparsify(model, plan, backend="cuda", one_list=one_list)
    layer = model.model.layers[1]
    for names, parent in ((("q", "k", "v"), layer.self_attn), (("gate", "up"), layer.mlp)):
        weights = [getattr(parent, f"{name}_proj").weight for name in names]
        together = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        assert together == one_list
    found = logits_of_steps(model, tokens, 8)
    assert taken == [batch] * 16
    handle.restore()
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) and after[name].is_contiguous() for name, t in before.items())
    assert not any("_together" in name for name in vars(layer))
    error, usual = ((x - expected).abs() for x in (found, plain))
    assert error.mean() < 1.2 * usual.mean() + 1e-6
    assert error.max() < 2.0 * usual.max() + 1e-3


def test_one_list_needs_shared_masks_and_the_cuda_backend(op_device, dtype):
    model = model_of("llama", op_device, dtype)
    with pytest.raises(
        ConfigError, match=r"one_list: needs the cuda backend, .*, got cuda, separate masks and weights as stored"
    ):
        sparsify(model, tiny_plan(model), backend="cuda", one_list=True)
    with pytest.raises(ConfigError, match="got reference, shared masks and weights as stored"):
        sparsify(model, tiny_plan(model, masks="shared"), backend="reference", one_list=True)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_left_padding(family, op_device, dtype, monkeypatch):
    model = model_of(family, op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(2, 16).to(op_device)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    tokens[1, :5] = 0
    taken = steps_taken(monkeypatch)
    with sparsify(model, plan, backend="cuda") as sparse:
        padded = logits_of_steps(sparse, tokens, 10, mask)
        alone = logits_of_steps(sparse, tokens[1:, 5:], 5)
    assert taken
    # Half precision: the plain path differs between the two as well, where masks differ in a few channels.
    with sparsify(model, plan, backend="reference") as sparse:
        usual = (
            logits_of_steps(sparse, tokens, 10, mask)[:, 1] - logits_of_steps(sparse, tokens[1:, 5:], 5)[:, 0]
        ).abs()
    assert (padded[:, 1] - alone[:, 0]).abs().mean() < 2.0 * usual.mean() + 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_with_both_caches(batch, op_device, dtype, monkeypatch):
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(batch, 7).to(op_device)
    options = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    with sparsify(model, plan, backend="reference") as sparse:
        expected = sparse.generate(tokens, **options)
    taken = steps_taken(monkeypatch)
    with sparsify(model, plan, backend="cuda") as sparse:
        dynamic = sparse.generate(tokens, **options)
        assert not taken  # a growing cache has no place to append to
        static = sparse.generate(tokens, cache_implementation="static", **options)
    assert taken
    if op_device == "cpu":
        assert torch.equal(dynamic, expected)
        assert torch.equal(static, expected)
    assert static.shape == expected.shape


def test_steps_that_are_not_covered_take_the_plain_path(op_device, dtype, monkeypatch):
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    taken = steps_taken(monkeypatch)
    tokens = tokens_of(17, 12).to(op_device)
    handle = sparsify(model, plan, backend="cuda")
    logits_of_steps(model, tokens, 10)  # more rows than a launch takes
    with torch.inference_mode():
        model(tokens[:1, :1])  # no cache
    with handle.counting() as counts:
        logits_of_steps(model, tokens[:1], 10)
    assert not taken
    assert counts.tokens == 2
    handle.restore()
    with sparsify(model, plan, backend="cuda", dense_above=2) as sparse:
        logits_of_steps(sparse, tokens[:3], 10)
        assert not taken
        logits_of_steps(sparse, tokens[:2], 10)
    assert set(taken) == {2}


def test_other_families_run_without_fused_blocks(op_device, dtype):
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**{**WIDER, "num_key_value_heads": 4})).eval().to(op_device, dtype)
    assert not decode_block.fits(model.model.layers[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_step_compiles_without_a_graph_break(op_device, dtype):
    model = model_of("llama", op_device, dtype)
    plan = tiny_plan(model)
    tokens = tokens_of(1, 12).to(op_device)
    with sparsify(model, plan, backend="cuda") as sparse:
        expected = logits_of_steps(sparse, tokens, 8)
        backend = "inductor" if op_device == "cuda" or shutil.which("g++") else "aot_eager"
        compiled = torch.compile(sparse.forward, fullgraph=True, backend=backend)
        cache = StaticCache(config=model.config, max_cache_len=21)
        found = []
        with torch.inference_mode():
            sparse(tokens[:, :8], past_key_values=cache, use_cache=True)
            for at in range(8, 12):
                found.append(compiled(tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    torch.testing.assert_close(torch.stack(found), expected, rtol=0.02, atol=0.02 if op_device == "cuda" else 1e-4)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_cuda_graph(cuda):
    model = model_of("qwen3", "cuda", torch.bfloat16)
    plan = tiny_plan(model)
    tokens = tokens_of(1, 12).to(cuda)
    with sparsify(model, plan) as sparse, torch.inference_mode():
        expected = logits_of_steps(sparse, tokens, 8)
        cache = StaticCache(config=model.config, max_cache_len=21)
        sparse(tokens[:, :8], past_key_values=cache, use_cache=True)
        start = copy.deepcopy(cache)
        token = tokens[:, 8:9].clone()
        sparse(token, past_key_values=start, use_cache=True)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = sparse(token, past_key_values=cache, use_cache=True).logits
        found = []
        for at in range(8, 12):
            token.copy_(tokens[:, at : at + 1])
            graph.replay()
            found.append(logits[:, -1].clone())
    assert torch.equal(torch.stack(found), expected)
