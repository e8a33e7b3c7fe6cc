"""A backward pass through a frozen causal LM with a custom function on every projection's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from was_search.checkpoints.structure import Structure
from was_search.masks.evaluation import sequence_nats
from was_search.masks.inputs import InputFunction, hook_inputs
from was_search.masks.masked_model import MaskedModel
from was_search.masks.recompute import recomputed_blocks
from was_search.texts.protocol import TokenSet


def backward_pass(model: MaskedModel, data: TokenSet, function: InputFunction) -> float:
    """Take the gradient of the summed nats through ``function`` on every projection's input; returns those nats.

    Weights need no gradient and get none. ``function`` does its work in its own backward, which runs once for
    every batch; where the model recomputes its forward runs twice, and memory is that of one block.
    """
    predicted = data.protocol.predicted_per_sequence
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    structure = model.structure
    with _on_inputs(structure, function), _gradient_from_embeddings(model.model) as starts, torch.enable_grad():
        for batch in model.batches(data):
            with recomputed_blocks(structure, model.recompute):
                nats = sequence_nats(model.model, batch, predicted).sum()
                torch.autograd.grad(nats, starts)
            total += nats.detach().double().to(model.device)
    return float(total)


@contextmanager
def _on_inputs(structure: Structure, function: InputFunction) -> Iterator[None]:
    handles = hook_inputs(structure, function)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradient_from_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """Start the gradient path at the embeddings' output, as frozen weights give none."""
    starts: list[Tensor] = []

    def start(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        starts[:] = [out.detach().requires_grad_(True)]
        return starts[0]

    handle = model.get_input_embeddings().register_forward_hook(start)  # type: ignore[operator]
    try:
        yield starts
    finally:
        handle.remove()
