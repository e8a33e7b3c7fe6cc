"""A backward pass through a frozen causal LM with a custom function on every projection's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from was_search.checkpoints.structure import Structure
from was_search.masks.corrections import Corrections, corrected_outputs
from was_search.masks.divergence import DenseTop
from was_search.masks.evaluation import sequence_losses, sequence_nats
from was_search.masks.inputs import InputFunction, hook_inputs
from was_search.masks.masked_model import MaskedModel
from was_search.masks.recompute import activations_fit, recomputed_blocks
from was_search.texts.protocol import TokenSet


def backward_pass(
    model: MaskedModel,
    data: TokenSet,
    function: InputFunction,
    *,
    corrections: Corrections | None = None,
    top: DenseTop | None = None,
) -> float:
    """Take the gradient of the summed nats through ``function`` on every projection's input; returns those nats.

    Weights need no gradient and get none. ``function`` does its work in its own backward, which runs once for
    every batch; where the model recomputes, and has not room enough, its forward runs twice, and memory is that of one
    block.

    Args:
        model: the model.
        data: the sequences.
        function: on every input.
        corrections: of outputs; None: the model's own, if it has any.
        top: the dense model's top of all sequences of ``data``; makes the divergence from it the loss.
    """
    protocol, structure = data.protocol, model.structure
    predicted = protocol.predicted_per_sequence
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    by = model.corrections if corrections is None else corrections
    done = 0
    tokens = min(protocol.batch_size, len(data.tokens)) * protocol.sequence_length
    recompute = model.recompute and not activations_fit(model.model, structure, tokens)
    with (
        _on_inputs(structure, function),
        corrected_outputs(structure, by, protocol.dense_prefix),
        _gradient_from_embeddings(model.model) as starts,
        torch.enable_grad(),
    ):
        for batch in model.batches(data):
            with recomputed_blocks(structure, recompute):
                if top is None:
                    nats = sequence_nats(model.model, batch, predicted).sum()
                else:
                    nats = sequence_losses(model.model, batch, predicted, top[done : done + len(batch)])[0].sum()
                torch.autograd.grad(nats, starts)
            done += len(batch)
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
