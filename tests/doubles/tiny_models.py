"""Random transformers models of two blocks, and plans for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
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

from was_search.checkpoints.structure import find_structure
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.plan import Plan
from was_search.shape import N_PROJECTIONS, Masks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
FUSED_FAMILIES = ("phi3", "glm4")
"""Families with fused maps, which need shared masks."""

SIZE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WIDER: dict[str, Any] = {**SIZE, "hidden_size": 256, "intermediate_size": 344}
"""Wide enough for the fused decode steps: every width is a multiple of 8, and heads have 64 channels."""


def _random(seed: int, build: Callable[..., Any], *given: Any) -> Any:
    """A copy of what ``build`` makes of ``given`` after seeding torch; it is made once in a process.

    torch's generator is left as making it leaves it.
    """
    torch.manual_seed(seed)
    key = seed, build.__name__, repr(given)
    if key not in _made:
        _made[key] = build(*given), torch.get_rng_state()
    model, state = _made[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


_made: dict[tuple[int, str, str], tuple[Any, torch.Tensor]] = {}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """float64 by default: the order of sums then never moves a score across a threshold."""
    return _random(seed, _tiny_model, family, dtype)


def _tiny_model(family: str, dtype: torch.dtype) -> Any:
    config, build = {
        "llama": (LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True), LlamaForCausalLM),
        "mistral": (MistralConfig(**SIZE, sliding_window=6), MistralForCausalLM),
        "qwen2": (Qwen2Config(**SIZE), Qwen2ForCausalLM),
        "qwen3": (Qwen3Config(**SIZE, head_dim=16), Qwen3ForCausalLM),
        "gemma2": (Gemma2Config(**SIZE, head_dim=16, sliding_window=6), Gemma2ForCausalLM),
        "phi3": (Phi3Config(**SIZE), Phi3ForCausalLM),
        "glm4": (Glm4Config(**SIZE, head_dim=12, attention_bias=True), Glm4ForCausalLM),
    }[family]
    model = build(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # larger weights than the usual start, so that masks matter
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "bias" in name else 0.2))
    return model


def tiny_plan(
    model: Any, *, sparsity: float = 0.5, dense_prefix: int = 1, score: Any = "l2", masks: Masks = "separate"
) -> Plan:
    """Thresholds at the scores' quantile on random tokens; one projection, or its group, stays dense."""
    masked = MaskedModel.of(model, score, masks)
    structure = masked.structure
    samples: dict[tuple[int, int], list[np.ndarray]] = {}

    def observe(b: int, p: int, scores: torch.Tensor) -> None:
        samples.setdefault((b, p), []).append(scores.flatten().cpu().double().numpy())

    tokens = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(1), device="cpu")
    with torch.inference_mode(), Masking(masked, None, observer=observe):
        model(tokens.to(next(model.parameters()).device), use_cache=False)
    n_blocks = len(structure.blocks)
    sparsities = np.full((n_blocks, N_PROJECTIONS), sparsity)
    sparsities[0, list(next(group for group in structure.shape.groups if 2 in group))] = 0.0
    thresholds = np.zeros((n_blocks, N_PROJECTIONS), np.float32)
    for (b, p), found in samples.items():
        thresholds[b, p] = np.quantile(np.concatenate(found), sparsities[b, p]) if sparsities[b, p] else 0.0
    return Plan(
        model="tiny",
        revision="",
        fingerprint="f" * 64,
        shape=structure.shape,
        score=score,
        budget=structure.shape.sparsity(sparsities),
        dense_prefix=dense_prefix,
        sparsities=sparsities,
        thresholds=structure.shape.copied(thresholds),
        norms=tuple(tuple(n.cpu().numpy() for n in row) for row in masked.norms),
        weights=structure.weights,
    )


def plan_apart(model: Any, plan: Plan, tokens: torch.Tensor) -> Plan:
    """The plan with each threshold in the widest gap nearby that scores of ``tokens``, under its masks, leave.

    float32 sums in another order, which every kind of CPU has of its own, then move no score across it.
    """
    masked = MaskedModel.of(model, plan.score, plan.shape.masks)
    thresholds = plan.thresholds.copy()
    for b, p in zip(*np.nonzero(thresholds), strict=True):
        found: list[np.ndarray] = []

        def observe(block: int, projection: int, scores: torch.Tensor, at: Any = (b, p), into: Any = found) -> None:
            if (block, projection) == at:
                into.append(scores.flatten().cpu().double().numpy())

        masking = Masking(masked, thresholds, dense_prefix=plan.dense_prefix, observer=observe)
        with torch.inference_mode(), masking:
            model(tokens.to(next(model.parameters()).device), use_cache=False)
        if found:  # maps that share a mask have the threshold of the first
            scores = np.sort(np.concatenate(found))
            near = np.searchsorted(scores, thresholds[b, p]) + np.arange(-len(scores) // 20, len(scores) // 20)
            near = near[(near >= 0) & (near < len(scores) - 1)]
            low = near[np.argmax(scores[near + 1] - scores[near])]
            thresholds[b, p] = (scores[low] + scores[low + 1]) / 2.0
            thresholds = plan.shape.copied(thresholds)
    return replace(plan, thresholds=thresholds)


def masked_logits(model: Any, plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the dense model with hooks that mask and correct, from whole sequences and without a cache."""
    structure = find_structure(model, plan.shape.masks)
    norms = [[torch.tensor(n, device=tokens.device) for n in row] for row in plan.norms]
    masked = MaskedModel(model, structure, norms).compensated(plan.compensation)
    masking = Masking(masked, plan.thresholds, dense_prefix=plan.dense_prefix)
    with torch.inference_mode(), masking:
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


FUSED_STEPS = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**size)),
    "llama-32": lambda size: LlamaForCausalLM(LlamaConfig(**size, head_dim=32)),
    "llama-bias": lambda size: LlamaForCausalLM(LlamaConfig(**size, attention_bias=True, mlp_bias=True)),
    "mistral": lambda size: MistralForCausalLM(MistralConfig(**size, head_dim=128, sliding_window=None)),
    "qwen2": lambda size: Qwen2ForCausalLM(Qwen2Config(**size)),
    "qwen3": lambda size: Qwen3ForCausalLM(Qwen3Config(**size, head_dim=64)),
}
"""Models whose one-token steps run fused, by name."""


def model_of(family: str, device: str, dtype: torch.dtype, **sizes: int) -> Any:
    """A random model of :data:`FUSED_STEPS`."""
    return _random(3, _model_of, family, device, dtype, sizes)


def _model_of(family: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> Any:
    model = FUSED_STEPS[family]({**WIDER, **sizes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.2 if "bias" in name else 0.08))
    return model.to(device, dtype)


def tokens_of(batch: int, length: int, seed: int = 5) -> torch.Tensor:
    """Random tokens, the same for the same shape and seed."""
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of_steps(
    model: Any, tokens: torch.Tensor, prompt: int, mask: torch.Tensor | None = None, forward: Any = None
) -> torch.Tensor:
    """Logits of the tokens after the prompt, one by one over a static cache; ``forward`` takes these, if given."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 9)
    found = []
    with torch.inference_mode():
        for first, last in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]:
            given = {} if mask is None else {"attention_mask": mask[:, :last]}
            if mask is not None:
                given["position_ids"] = (mask[:, :last].cumsum(-1) - 1).clamp(min=0)[:, first:]
            call = model if first == 0 or forward is None else forward
            found.append(call(tokens[:, first:last], past_key_values=cache, use_cache=True, **given).logits[:, -1])
    return torch.stack(found[1:])


def logits_of_replays(model: Any, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """The same of steps that are one CUDA graph, captured at the first of them and replayed for each."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 9)
    found = []
    with torch.inference_mode():
        model(tokens[:, :prompt], past_key_values=cache, use_cache=True)
        token = tokens[:, prompt : prompt + 1].clone()
        model(token, past_key_values=copy.deepcopy(cache), use_cache=True)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, past_key_values=cache, use_cache=True).logits
        for at in range(prompt, tokens.shape[1]):
            token.copy_(tokens[:, at : at + 1])
            graph.replay()
            found.append(logits[:, -1].clone())
    return torch.stack(found)


def assert_compiles(model: Any, tokens: torch.Tensor, prompt: int) -> None:
    """Steps through torch.compile, as one graph, give the same logits; on a CPU the graph runs as it was traced.

    There writing it out as C++ takes torch half a minute and says nothing about what is traced.
    """
    expected = logits_of_steps(model, tokens, prompt)
    backend = "inductor" if tokens.is_cuda else "aot_eager"
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    found = logits_of_steps(model, tokens, prompt, forward=compiled)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 if tokens.is_cuda else 1e-4)


def assert_as_exact(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """In half precision channels change sides of their threshold, on the plain path as well."""
    error, usual = ((x - exact).abs() for x in (found, plain))
    assert error.mean() < 1.2 * usual.mean() + 1e-6
    assert error.max() < 2.0 * usual.max() + 1e-3
