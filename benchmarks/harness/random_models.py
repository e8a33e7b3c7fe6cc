"""Models for timing, of random weights or from a folder, and plans of one sparsity for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from scripts.make_random_model import SHAPES, draw
from was_search.checkpoints.structure import find_structure
from was_search.compensation import Compensation
from was_search.masks.inputs import hook_inputs
from was_search.masks.masked_model import structure_norms
from was_search.plan import Plan
from was_search.shape import N_PROJECTIONS, Masks

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CALIBRATION_TOKENS = 512


def build(name: str, dtype: torch.dtype, *, device: str = "cuda", blocks: int | None = None) -> Any:
    """A model of random weights of a named shape, with ``blocks`` blocks if given, or the one in a folder."""
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    shape = SHAPES[name] if blocks is None else {**SHAPES[name], "num_hidden_layers": blocks}
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    outline = model.state_dict()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(draw(key, outline[key], config.num_hidden_layers, generator))
    with torch.device(device):
        rotary = type(model.model.rotary_emb)(config=config)
        model.model.rotary_emb = rotary  # the model's buffers are not in the state
    return model.eval()


@torch.inference_mode()
def plan_at(
    model: Any, sparsity: float, masks: Masks = "separate", dense_prefix: int = 1, tokens: Tensor | None = None
) -> Plan:
    """A plan of one sparsity everywhere, calibrated and exact on ``tokens`` [1, n], random ones if not given."""
    structure = find_structure(model, masks)
    norms = structure_norms(structure, "l2")
    thresholds = np.zeros((len(structure.blocks), N_PROJECTIONS), np.float32)

    def mask(b: int, p: int, x: Tensor) -> Tensor:
        scores = x[:, dense_prefix:].abs().float() * norms[b][p]
        rank = max(1, round(sparsity * scores.numel()))
        limit = scores.flatten().kthvalue(rank).values
        thresholds[b, p] = float(limit)
        kept = torch.where(x.abs().float() * norms[b][p] >= limit, x, torch.zeros_like(x))
        kept[:, :dense_prefix] = x[:, :dense_prefix]
        return kept

    if sparsity > 0.0:
        handles = hook_inputs(structure, mask)
        device = next(model.parameters()).device
        if tokens is None:
            tokens = torch.randint(0, model.config.vocab_size, (1, CALIBRATION_TOKENS), device=device)
        model.model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
    thresholds = structure.shape.copied(thresholds)
    return Plan(
        model="random",
        revision="",
        fingerprint="0" * 64,
        shape=structure.shape,
        score="l2",
        budget=max(sparsity, 1e-3),
        dense_prefix=dense_prefix,
        sparsities=np.full(thresholds.shape, sparsity),
        thresholds=thresholds,
        norms=tuple(tuple(n.cpu().numpy() for n in row) for row in norms),
        weights=structure.weights,
    )


def compensated(plan: Plan, spread: float = 0.15) -> Plan:
    """``plan`` with random scales about 1 and constants about 0, of the standard deviation ``spread``."""
    nothing = Compensation.none(plan.shape).flat()
    drawn = np.random.default_rng(0).normal(0.0, spread, len(nothing)).astype(np.float32)
    return replace(plan, compensation=Compensation.from_flat(plan.shape, nothing + drawn))
