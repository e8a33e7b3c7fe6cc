"""A plan put on and taken off inside torch's modes: the weights can be trained afterwards, bit for bit the same."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from scripts.make_random_model import make_random_model
from tests.doubles.tiny_models import FAMILIES, FUSED_FAMILIES, tiny_model, tiny_plan
from was_kernels import sparsify
from was_search.checkpoints.load import load_model

TOKENS = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "enable_grad": torch.enable_grad}


def train(model: torch.nn.Module) -> None:
    """A backward pass and a step, which change weights in place."""
    model.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def nowhere() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED_FAMILIES])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["around all", "around sparsify", "around restore"])
def test_weights_can_be_trained_after_a_plan(family, mode, where):
    model = tiny_model(family, dtype=torch.float32)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    plan = tiny_plan(model, masks="shared" if family in FUSED_FAMILIES else "separate")
    inside = MODES[mode]
    with inside() if where == "around all" else nowhere():
        with inside() if where == "around sparsify" else nowhere():
            handle = sparsify(model, plan)
        with torch.inference_mode():
            model(TOKENS)
        with inside() if where == "around restore" else nowhere():
            handle.restore()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    train(model)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_inside_leaves_weights_that_can_be_trained(mode):
    model = tiny_model("llama", dtype=torch.float32)
    with contextlib.suppress(ZeroDivisionError), MODES[mode](), sparsify(model, tiny_plan(model)):
        raise ZeroDivisionError
    train(model)


def test_a_model_loaded_inside_can_be_trained(tmp_path: Path):
    folder = make_random_model(tmp_path / "tiny", "tiny")
    with torch.inference_mode():
        plain, rounded = (load_model(str(folder), dtype="float32", weights=weights) for weights in ("none", "int8"))
    for model in (plain, rounded):
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    train(plain)
