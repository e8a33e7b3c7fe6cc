"""A backward pass through a frozen causal LM with a custom function on every projection's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from was_search.checkpoints.structure import Structure
from was_search.masks.attention import attention_in_order
from was_search.masks.corrections import Corrections, corrected_outputs
from was_search.masks.evaluation import sequence_nats, top_losses
from was_search.masks.inputs import InputFunction, hook_inputs
from was_search.masks.masked_model import MaskedModel
from was_search.masks.recompute import activations_fit, recomputed_blocks
from was_search.texts.protocol import EvaluationProtocol, TokenSet

TopRows = tuple[Tensor, Tensor]
"""The dense model's top as :meth:`was_search.masks.divergence.DenseTop.rows` has it."""

Backward = Callable[[Tensor, TopRows | None], Tensor]
"""Forward and backward of a batch: its tokens, int64 [sequences, length], and the dense model's top or None -> nats.

The nats are summed over the batch, a float64 scalar on the model's device. It asks the host for nothing.
"""


def backward_pass(model: MaskedModel, data: TokenSet, function: InputFunction) -> float:
    """Take the gradient of the summed nats through ``function`` on every projection's input; returns those nats.

    ``function`` does its work in its own backward, which runs once for every batch. Outputs are corrected by the
    model's compensation, if it has one.

    Args:
        model: the model.
        data: the sequences.
        function: on every input.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    protocol = data.protocol
    tokens = min(protocol.batch_size, len(data.tokens)) * protocol.sequence_length
    with opened(model, protocol, function, model.corrections, recomputes(model, tokens)) as backward:
        for batch in model.batches(data):
            total += backward(batch, None)
    return float(total)


def recomputes(model: MaskedModel, tokens: int) -> bool:
    """Whether the model recomputes, and has not room enough to do without for a batch of so many tokens."""
    return model.recompute and not activations_fit(model.model, model.structure, tokens)


@contextmanager
def opened(
    model: MaskedModel,
    protocol: EvaluationProtocol,
    function: InputFunction,
    corrections: Corrections | None,
    recompute: bool,
) -> Iterator[Backward]:
    """While open, the backward passes of batches can be taken, with ``function`` on every input.

    Weights need no gradient and get none.

    Args:
        model: the model.
        protocol: of the batches.
        function: on every projection's input.
        corrections: of outputs; None: there are none.
        recompute: run each block's forward, and so ``function``'s, once more, so that memory is that of one block.
    """
    structure, predicted = model.structure, protocol.predicted_per_sequence
    with (
        attention_in_order(model.model, protocol.sequence_length),
        _on_inputs(structure, function),
        corrected_outputs(structure, corrections, protocol.dense_prefix),
        _gradient_from_embeddings(model.model) as starts,
        torch.enable_grad(),
    ):

        def backward(batch: Tensor, top: TopRows | None) -> Tensor:
            with recomputed_blocks(structure, recompute):
                if top is None:
                    nats = sequence_nats(model.model, batch, predicted).sum()
                else:
                    nats = top_losses(model.model, batch, predicted, *top)[0].sum()
                torch.autograd.grad(nats, starts)
            return nats.detach().double().to(model.device)

        yield backward


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
