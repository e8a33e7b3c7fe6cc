"""The Fisher price of sparsity: one backward pass prices every projection at every level.

With g the gradient of the summed nats at a projection's output and dy the output's change when its input is
masked at sparsity s, ``price(b, p, s) = 1/2 mean_t (g_t . dy_t)^2``. The change is linear in what is dropped,
``g_t . dy_t = - sum over dropped j of (W^T g_t)_j x_tj``, so one sorted sum per token serves all levels: channels
are put into the bins between the levels' thresholds and summed up.

The same pass through the masked model prices steps away from a sparse point: dy is then the change from the
present masks, and the loss is no longer flat there, so its first-order term ``mean_t (g_t . dy_t)`` counts too.
On the dense model that term is left out: the training has made it vanish, and what is left of it is noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from was_search.evaluation import sequence_nats
from was_search.masking import Masking
from was_search.score import scores
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray
from was_search.structure import Structure

DEFAULT_GRID: FloatArray = np.round(np.arange(0.0, 0.951, 0.025), 6)
"""Sparsities at which projections are priced, [39]."""


def price_sums(
    model: nn.Module,
    structure: Structure,
    norms: list[list[Tensor]],
    tokens: IntArray,
    level_thresholds: npt.NDArray[np.float32],
    *,
    batch_size: int,
    dense_prefix: int,
    predicted: int,
    thresholds: npt.NDArray[np.float32] | None = None,
) -> tuple[FloatArray, int]:
    """Sum over tokens of the price of every projection and level, and the number of tokens.

    Sums and token counts add up over shards. Memory is that of a forward and backward of one batch; the
    weights need no gradient and get none.

    Args:
        model: a causal LM; its parameters may be frozen.
        structure: its blocks.
        norms: from ``structure_norms``.
        tokens: [n, sequence_length].
        level_thresholds: [L, 7, G], the threshold of every level of the grid, rising; level 0 has threshold 0.
        batch_size: sequences per forward and backward.
        dense_prefix: positions that are never masked and so cost nothing.
        predicted: tokens predicted in one sequence, from its end.
        thresholds: [L, 7], the sparse point to price from; None is the dense model.

    Returns:
        Sums of ``1/2 (g_t . dy_t)^2``, at a sparse point of ``g_t . dy_t + 1/2 (g_t . dy_t)^2``: [L, 7, G]
        float64, nats; and the number of tokens.
    """
    device = next(model.parameters()).device
    G = level_thresholds.shape[-1]
    sums = torch.zeros((len(structure.blocks), N_PROJECTIONS, G), dtype=torch.float64, device=device)
    bounds = torch.as_tensor(level_thresholds, device=device)
    inputs: dict[tuple[int, int], Tensor] = {}
    handles = []

    def keep_input(b: int, p: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[b, p] = args[0].detach()

        return hook

    def price(b: int, p: int) -> Any:
        def hook(linear: nn.Linear, _: Any, grad_output: tuple[Tensor, ...]) -> None:
            x = inputs.pop((b, p))[:, dense_prefix:].flatten(0, 1)
            g = grad_output[0][:, dense_prefix:].flatten(0, 1)
            contribution = (g @ linear.weight).float() * x.float()
            # Bin i holds the channels dropped at level i but not at level i - 1; the last bin is never dropped.
            score = scores(x, norms[b][p])
            bins = torch.searchsorted(bounds[b, p], score, right=True)
            binned = contribution.new_zeros((len(x), G + 1)).scatter_add_(1, bins, contribution)
            change = -binned.cumsum(1)[:, :G].double()
            if thresholds is not None:
                present = contribution.where(score < float(thresholds[b, p]), 0.0)
                change += present.sum(1, keepdim=True).double()
                sums[b, p] += change.sum(0)
            sums[b, p] += 0.5 * change.square().sum(0)

        return hook

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    for b, p, linear in structure.linears():
        handles.append(linear.register_forward_pre_hook(keep_input(b, p)))
        handles.append(linear.register_full_backward_hook(price(b, p)))
    starts: list[Tensor] = []

    def start_gradient(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        starts[:] = [out.detach().requires_grad_(True)]
        return starts[0]

    # Frozen weights give no gradient path: the embeddings' output starts one.
    handles.append(embeddings.register_forward_hook(start_gradient))
    try:
        with torch.enable_grad(), Masking(structure, norms, thresholds, dense_prefix=dense_prefix):
            for start in range(0, len(tokens), batch_size):
                batch = torch.as_tensor(tokens[start : start + batch_size], dtype=torch.long, device=device)
                torch.autograd.grad(sequence_nats(model, batch, predicted).sum(), starts)
                inputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    n_tokens = len(tokens) * (tokens.shape[1] - dense_prefix)
    return sums.cpu().numpy(), n_tokens
