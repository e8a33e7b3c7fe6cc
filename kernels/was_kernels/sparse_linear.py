"""A linear map that skips the weights of dropped input channels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from was_kernels.counting import ProjectionCount
from was_kernels.gather_gemv import HALF, MAX_CHANNELS, MAX_ROWS, gather_gemv
from was_kernels.positions import DensePrefix
from was_kernels.reference import kept_channels, score_mask_reference

DENSE_ABOVE = 8
"""Rows of a one-token step above which it keeps every channel, unless told otherwise.

Rows keep channels almost independently: at 50 % and 8 rows all but 0.4 % of the weights must be read anyway, so that
little is left to be saved. A Llama-2-7B's step of 8 rows still takes 0.97 of what torch.compile makes of the dense one
(H100, 50 %), which hardly grows with the rows; that of 16 rows took 1.4 times as long as that of 8.
"""


class SparseLinear(nn.Module):
    """Replaces an ``nn.Linear`` in place: same parameters, weight held column-major, inputs masked.

    One-token steps of up to 16 rows use the CUDA sparse GEMV (``counters``) or the Triton one (``triton=True``), unless
    they have more than ``dense_above`` rows, which makes them dense; everything else masks the input and multiplies
    densely. For inference: none passes a gradient.

    The linear's own weight parameter is kept, so its identity, name and dtype stay; only its storage changes
    to [in_features, out_features]. One weight at a time exists twice, for the moment of the copy.

    Args:
        linear: what is replaced; it shares its parameters, and must not be used until :meth:`restore_layout`.
        norms: float32 [in_features], on the weight's device.
        threshold: the score under which a channel is dropped; zero or less drops nothing.
        prefix: tells which tokens are dense; None masks every token.
        triton: use the Triton kernels.
        dense_prompts: mask one-token steps only.
        counters: of :func:`was_kernels.gather_gemv.counters`, to use the CUDA kernel where it fits; None: never.
        dense_above: one-token steps of more rows keep every channel; None: none do.
    """

    def __init__(
        self,
        linear: nn.Linear,
        norms: Tensor,
        threshold: float,
        *,
        prefix: DensePrefix | None,
        triton: bool,
        dense_prompts: bool = False,
        counters: Tensor | None = None,
        dense_above: int | None = DENSE_ABOVE,
    ) -> None:
        self._init_common(linear, norms, threshold, prefix, triton, dense_prompts, dense_above)
        self.weight = linear.weight
        self.dtype = linear.weight.dtype
        self.channel_bytes = self.out_features * self.weight.element_size()
        if triton:
            from was_kernels.sparse_gemv import sparse_gemv

            self._gemv = sparse_gemv
        fits = self.out_features % 8 == 0 and self.in_features <= MAX_CHANNELS and self.weight.dtype in HALF
        self._counters = counters if fits else None
        self.weight.data = self.weight.data.t().contiguous().t()

    def _init_common(
        self,
        linear: Any,
        norms: Tensor,
        threshold: float,
        prefix: DensePrefix | None,
        triton: bool,
        dense_prompts: bool,
        dense_above: int | None,
    ) -> None:
        """What does not depend on how the weight is held."""
        super().__init__()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.bias = linear.bias
        self.norms: Tensor
        self.register_buffer("norms", norms, persistent=False)
        self.threshold = threshold
        self.count: ProjectionCount | None = None
        self._prefix = prefix
        self._triton = triton
        self._dense_prompts = dense_prompts
        self._dense_above = sys.maxsize if dense_above is None else dense_above
        self._mask_op = score_mask_reference
        if triton:
            from was_kernels.score_mask import score_mask

            self._mask_op = score_mask
        self.train(linear.training)

    @property
    def weight_t(self) -> Tensor:
        """[in_features, out_features]: the same memory as ``weight``, contiguous."""
        return self.weight.t()

    def restore_layout(self) -> None:
        """Put the weight back in row-major order, bit for bit; the replaced linear may be used again."""
        self.weight.data = self.weight.data.contiguous()

    def step_threshold(self, rows: int) -> float:
        """That of a one-token step: zero, which keeps every channel, where it has more than ``dense_above`` rows."""
        return 0.0 if rows > self._dense_above else self.threshold

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        rows = x.numel() // self.in_features
        one_token = x.dim() < 3 or x.shape[-2] == 1
        dense = None if self._prefix is None else self._prefix.dense(x)
        threshold = self.step_threshold(rows) if one_token else self.threshold
        if self.count is not None and one_token:
            self.count.add(kept_channels(x.reshape(rows, -1), self.norms, threshold), dense)
        if threshold <= 0.0 or (self._dense_prompts and not one_token):
            return self._multiply(x)
        if one_token:
            y = self._few_rows(x.reshape(rows, self.in_features), dense)
            if y is not None:
                return y.view(*x.shape[:-1], self.out_features)
        return self._multiply(self._mask_op(x, self.norms, self.threshold, dense))

    def _multiply(self, x: Tensor) -> Tensor:
        """The dense product."""
        return F.linear(x, self.weight, self.bias)

    def _few_rows(self, x: Tensor, dense: Tensor | None) -> Tensor | None:
        """The sparse product of x [B, in_features], or None where no kernel takes it."""
        rows = x.shape[0]
        if x.dtype != self.weight.dtype:
            return None
        if self._counters is not None and rows <= MAX_ROWS:
            return gather_gemv(
                x,
                [self.weight_t],
                [self.norms],
                [self.threshold],
                [self.bias],
                self._counters,
                dense=dense,
                early=True,
            )
        if self._triton and rows <= MAX_ROWS:
            y: Tensor = self._gemv(x, self.weight_t, self.norms, self.threshold, self.bias, dense)
            return y
        return None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, threshold={self.threshold:.4g}, "
            f"{'triton' if self._triton else 'reference'}"
        )


@torch.no_grad()
def lay_side_by_side(projections: Sequence[SparseLinear]) -> Tensor:
    """Move the weights of projections with one input into one [in_features, sum of out_features]; returns it.

    What a kept channel reads is one run of memory then. The weights of these projections exist twice meanwhile.
    """
    together = torch.cat([projection.weight_t for projection in projections], dim=1)
    first = 0
    for projection in projections:
        projection.weight.data = together[:, first : first + projection.out_features].t()
        first += projection.out_features
    return together


def norms_like(values: Tensor, device: torch.device) -> Tensor:
    """``values`` as float32 on the device of the weight."""
    return values.to(device=device, dtype=torch.float32).contiguous()
