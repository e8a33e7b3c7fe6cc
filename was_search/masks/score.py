"""The weight-aware score and the mask made from it, in plain torch.

``s_j = abs(x_j) * norm(W[:, j], p)``: how much input channel j can move the output. p = none is TEAL
(magnitude alone), 1 is WAS, 2 is WINA. A channel is kept when its score reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from was_search.shape import ScoreKind

MaskOp = Callable[[Tensor, Tensor, float | Tensor, int], tuple[Tensor, Tensor]]
"""A function like :func:`mask_input`; a fused one may take its place."""


def column_norms(weight: Tensor, kind: ScoreKind) -> Tensor:
    """Norm of every column of ``weight`` [out, in]; returns [in] float32 (ones for ``none``).

    The sum runs in float32 over row chunks, so that no float32 copy of a large half-precision weight is made.
    """
    if kind == "none":
        return torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in torch.split(weight.detach(), 1024):
        part = rows.float()
        total += part.abs().sum(dim=0) if kind == "l1" else part.square().sum(dim=0)
    return total if kind == "l1" else total.sqrt()


def combined_norms(norms: Sequence[Tensor], kind: ScoreKind) -> Tensor:
    """Column norms [in] of weights stacked upon one another, from those of each, all float32 [in]."""
    if kind == "none" or len(norms) == 1:
        return norms[0]
    stacked = torch.stack(list(norms))
    return stacked.sum(dim=0) if kind == "l1" else stacked.square().sum(dim=0).sqrt()


def scores(x: Tensor, norms: Tensor) -> Tensor:
    """``abs(x) * norms`` in float32; x [..., d] of any float dtype, norms [d] float32."""
    return x.detach().abs().float().mul_(norms)


def or_zero(keep: Tensor, x: Tensor) -> Tensor:
    """x where ``keep``, a bool like x, else zero: ``torch.where`` bit for bit, whatever x holds.

    On a CPU torch's loop takes a branch for every channel, half of them mispredicted; on bits it takes none, which is
    seven times as fast. Autograd knows nothing of bits: what it follows goes through torch's.
    """
    if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
        return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))
    bits = _BITS[x.element_size()]
    ones = keep.to(bits).neg_()  # every bit is set where a channel is kept
    return ones.bitwise_and_(x.view(bits)).view(x.dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer of a float's size, by its bytes."""


def masked(x: Tensor, norms: Tensor, threshold: float) -> Tensor:
    """x with the channels whose score is under ``threshold`` set to zero."""
    if threshold <= 0.0:
        return x
    return or_zero(scores(x, norms) >= threshold, x)


def mask_input(x: Tensor, norms: Tensor, threshold: float | Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """A projection's input with :func:`masked` applied after the prefix, and the number of channels kept there.

    Args:
        x: [batch, positions, d], whole sequences.
        norms: [d] float32.
        threshold: above 0, where a zero input is not kept; or a float32 scalar on x's device, which may be 0 as well.
        prefix: positions at a sequence's start that keep all channels.

    Returns:
        The masked input, like x; the number of kept channels, int64 scalar on x's device.
    """
    body = x[:, prefix:]
    keep = scores(body, norms) >= threshold
    body = or_zero(keep, body)
    # A score at a threshold above 0 is of no zero, and booleans are counted ten times as fast on a CPU.
    kept = keep if isinstance(threshold, Tensor) or np.float32(threshold) > 0.0 else body
    return torch.cat([x[:, :prefix], body], dim=1), torch.count_nonzero(kept)
