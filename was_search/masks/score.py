"""The weight-aware score and the mask made from it, in plain torch.

``s_j = abs(x_j) * norm(W[:, j], p)``: how much input channel j can move the output. p = none is TEAL
(magnitude alone), 1 is WAS, 2 is WINA. A channel is kept when its score reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from was_search.shape import ScoreKind

MaskOp = Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]
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
    return x.detach().abs().float() * norms


def masked(x: Tensor, norms: Tensor, threshold: float) -> Tensor:
    """x with the channels whose score is under ``threshold`` set to zero."""
    if threshold <= 0.0:
        return x
    return torch.where(scores(x, norms) >= threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))


def mask_input(x: Tensor, norms: Tensor, threshold: float, prefix: int) -> tuple[Tensor, Tensor]:
    """A projection's input with :func:`masked` applied after the prefix, and the number of channels kept there.

    Args:
        x: [batch, positions, d], whole sequences.
        norms: [d] float32.
        threshold: above 0; a zero input scores 0, so what is kept is what is not zero.
        prefix: positions at a sequence's start that keep all channels.

    Returns:
        The masked input, like x; the number of kept channels, int64 scalar on x's device.
    """
    body = masked(x[:, prefix:], norms, threshold)
    return torch.cat([x[:, :prefix], body], dim=1), torch.count_nonzero(body)
