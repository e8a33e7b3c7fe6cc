"""The Fisher price of sparsity: one backward pass prices every projection at every level.

With g the gradient of the summed nats at a projection's output and dy the output's change when its input is
masked at sparsity s, ``price(b, p, s) = 1/2 mean_t (g_t . dy_t)^2``. The change is linear in what is dropped,
``g_t . dy_t = - sum over dropped j of (W^T g_t)_j x_tj``, so one sorted sum per token serves all levels: channels
are put into the bins between the levels' thresholds and summed up. ``W^T g_t`` is the gradient at the input,
which the backward pass brings along. The first-order term is left out: training has made it vanish on average,
and what is left of it is noise. At a sparse point it counts: :mod:`was_search.slope`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from was_search.backward import backward_pass
from was_search.score import scores
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray
from was_search.structure import Structure

DEFAULT_GRID: FloatArray = np.round(np.arange(0.0, 0.951, 0.025), 6)
"""Sparsities at which projections are priced, [39]."""


PriceOp = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""What :func:`price_terms` does; a fused one may take its place."""


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
    recompute: bool = False,
    op: PriceOp | None = None,
) -> tuple[FloatArray, int]:
    """Sum over tokens of the price of every projection and level, and the number of tokens.

    Sums and token counts add up over shards. Memory is that of a forward and backward of one batch, with
    ``recompute`` of one block; the weights need no gradient and get none.

    Args:
        model: a causal LM; its parameters may be frozen.
        structure: its blocks.
        norms: from ``structure_norms``.
        tokens: [n, sequence_length].
        level_thresholds: [L, 7, G], the threshold of every level of the grid, rising; level 0 has threshold 0.
        batch_size: sequences per forward and backward.
        dense_prefix: positions that are never masked and so cost nothing.
        predicted: tokens predicted in one sequence, from its end.
        recompute: keep the activations of one block at a time, for one more forward.
        op: a fused replacement of :func:`price_terms`.

    Returns:
        Sums of ``1/2 (g_t . dy_t)^2``, [L, 7, G] float64, nats; and the number of tokens. Of projections that share
        a mask, ``g_t . dy_t`` is that of all of them, and the price is divided among them by parameters.
    """
    # Blocks may lie on several devices; a block's sums lie on its own.
    shape = (N_PROJECTIONS, level_thresholds.shape[-1])
    devices = [norms[b][0].device for b in range(len(structure.blocks))]
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for device in devices]
    bounds = [torch.as_tensor(level_thresholds[b], device=device) for b, device in enumerate(devices)]

    def priced(b: int, p: int, x: Tensor) -> Tensor:
        return _Priced.apply(x, norms[b][p], bounds[b][p], dense_prefix, sums[b][p], op or price_terms)  # type: ignore[no-any-return, no-untyped-call]

    backward_pass(model, structure, tokens, priced, batch_size=batch_size, predicted=predicted, recompute=recompute)
    found = structure.shape.divided(torch.stack([part.cpu() for part in sums]).numpy())
    return found, len(tokens) * (tokens.shape[1] - dense_prefix)


def price_terms(x: Tensor, gradient: Tensor, norms: Tensor, bounds: Tensor, prefix: int) -> Tensor:
    """Prices of one input at every level, summed over its tokens behind the prefix: float64 [G].

    Args:
        x: [sequences, positions, d].
        gradient: like x, of the summed nats at x.
        norms: [d] float32.
        bounds: float32 [G], the levels' thresholds, rising.
        prefix: positions that are never masked.
    """
    x = x[:, prefix:].flatten(0, 1)
    contribution = gradient[:, prefix:].flatten(0, 1).float() * x.float()
    # Bin i holds the channels dropped at level i but not at level i - 1; the last bin is never dropped.
    bins = torch.searchsorted(bounds, scores(x, norms), right=True)
    binned = contribution.new_zeros((len(x), len(bounds) + 1)).scatter_add_(1, bins, contribution)
    change = binned.cumsum(1)[:, :-1].double()
    return 0.5 * change.square().sum(0)


class _Priced(torch.autograd.Function):
    """Identity; its backward adds the prices of its input to ``sums`` [G]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Tensor, bounds: Tensor, prefix: int, sums: Tensor, op: PriceOp) -> Tensor:
        ctx.save_for_backward(x, norms, bounds)
        ctx.prefix, ctx.sums, ctx.op = prefix, sums, op
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, norms, bounds = ctx.saved_tensors
        ctx.sums += ctx.op(x, gradient, norms, bounds, ctx.prefix)
        return gradient, None, None, None, None, None
