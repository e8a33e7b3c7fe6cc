"""A model spread over two GPUs decodes with a plan as it does on one, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import DynamicCache, StaticCache

from benchmarks.harness.random_models import compensated
from tests.doubles.tiny_models import model_of, tiny_plan, tokens_of
from was_kernels.runtime.sparse_model import sparsify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

STEPS = 24


def spread(model: Any, *devices: int) -> Any:
    """Each of the two blocks on its device, with accelerate's hooks; the norm and the head beside the last."""
    places = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    places |= {f"model.layers.{i}": device for i, device in enumerate(devices)}
    places |= {"model.norm": devices[-1], "lm_head": devices[-1]}
    return dispatch_model(model, places, main_device=f"cuda:{devices[0]}", force_hooks=True)


def logits(model: nn.Module, plan: Any, backend: Any, batch: int, static: bool) -> torch.Tensor:
    """Of a prompt of 8 tokens and of one token at a time after it: (steps, rows, vocabulary), on the CPU."""
    tokens = tokens_of(batch, 8 + STEPS).to("cuda:0")
    config: Any = model.config
    cache: Any = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    found = []
    with sparsify(model, plan, backend=backend) as sparse, torch.inference_mode():
        for first, last in [(0, 8), *((at, at + 1) for at in range(8, 8 + STEPS))]:
            given = sparse(tokens[:, first:last], past_key_values=cache, use_cache=True)
            found.append(given.logits[:, -1].cpu())
    return torch.stack(found)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("corrects", [False, True])
def test_decodes_as_on_one(backend: str, batch: int, static: bool, corrects: bool) -> None:
    plan = tiny_plan(model_of("llama", "cuda:0", torch.bfloat16))
    plan = compensated(plan) if corrects else plan
    one = logits(spread(model_of("llama", "cuda:0", torch.bfloat16), 0, 0), plan, backend, batch, static)
    two = logits(spread(model_of("llama", "cpu", torch.bfloat16), 0, 1), plan, backend, batch, static)
    assert one.isfinite().all()
    assert torch.equal(one, two)
    if not static:  # over a static cache a model on one GPU takes fused steps, which round otherwise
        assert torch.equal(one, logits(model_of("llama", "cuda:0", torch.bfloat16), plan, backend, batch, static))


def test_the_current_device_may_be_another() -> None:
    model = spread(model_of("llama", "cpu", torch.bfloat16), 0, 1)
    plan = tiny_plan(model_of("llama", "cuda:0", torch.bfloat16))
    expected = logits(model, plan, "cuda", 1, False)
    with torch.cuda.device(1):
        assert torch.equal(logits(model, plan, "cuda", 1, False), expected)
