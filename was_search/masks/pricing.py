"""The Fisher price of sparsity: one backward pass prices every projection at every level.

With g the gradient of the summed nats at a projection's output and dy the output's change when its input is
masked at sparsity s, ``price(b, p, s) = 1/2 mean_t (g_t . dy_t)^2``. The change is linear in what is dropped,
``g_t . dy_t = - sum over dropped j of (W^T g_t)_j x_tj``, so one sorted sum per token serves all levels: channels
are put into the bins between the levels' thresholds and summed up. ``W^T g_t`` is the gradient at the input,
which the backward pass brings along. The first-order term is left out: training has made it vanish on average,
and what is left of it is noise. At a sparse point it counts: :mod:`was_search.masks.slope`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from was_search.masks.backward import backward_pass
from was_search.masks.gradient_terms import PriceOp
from was_search.masks.masked_model import MaskedModel
from was_search.shape import N_PROJECTIONS, FloatArray
from was_search.texts.protocol import TokenSet

DEFAULT_GRID: FloatArray = np.round(np.arange(0.0, 0.951, 0.025), 6)
"""Sparsities at which projections are priced, [39]."""


def price_sums(model: MaskedModel, data: TokenSet, level_thresholds: npt.NDArray[np.float32]) -> tuple[FloatArray, int]:
    """Sum over the tokens of ``data`` of the price of every projection and level, and the number of tokens.

    Sums and token counts add up over shards. Memory is that of a forward and backward of one batch, of one block
    where the model recomputes; the weights need no gradient and get none.

    Args:
        model: its parameters may be frozen.
        data: positions in the dense prefix are never masked and so cost nothing.
        level_thresholds: [L, 7, G], the threshold of every level of the grid, rising; level 0 has threshold 0.

    Returns:
        Sums of ``1/2 (g_t . dy_t)^2``, [L, 7, G] float64, nats; and the number of tokens. For projections that
        share a mask, ``g_t . dy_t`` is summed over them, and the price is divided among them by parameters.
    """
    # Blocks may lie on several devices; a block's sums lie on its device.
    shape, prefix = (N_PROJECTIONS, level_thresholds.shape[-1]), data.protocol.dense_prefix
    devices = model.block_devices
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for device in devices]
    bounds = [torch.as_tensor(level_thresholds[b], device=device) for b, device in enumerate(devices)]

    def priced(b: int, p: int, x: Tensor) -> Tensor:
        return _Priced.apply(x, model.norms[b][p], bounds[b][p], prefix, sums[b][p], model.ops.price)  # type: ignore[no-any-return, no-untyped-call]

    backward_pass(model, data, priced)
    found = model.shape.divided(torch.stack([part.cpu() for part in sums]).numpy())
    n_sequences, length = data.tokens.shape
    return found, n_sequences * (length - prefix)


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
