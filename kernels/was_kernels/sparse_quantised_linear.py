"""A linear map on weights of 8 or 4 bits that skips the weights of dropped input channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from was_kernels.gather_gemv import HALF, MAX_CHANNELS, MAX_ROWS, MAX_ROWS_ROUNDED
from was_kernels.gather_gemv_quantised import COLUMNS, gather_gemv_quantised
from was_kernels.positions import DensePrefix
from was_kernels.quantised_weight import QuantisedWeight
from was_kernels.sparse_linear import DENSE_ABOVE, SparseLinear
from was_search.quantised import QuantisedLinear


class SparseQuantisedLinear(SparseLinear):
    """Replaces a :class:`was_search.quantised.QuantisedLinear`, as :class:`SparseLinear` replaces an ``nn.Linear``.

    The packed weight is column-major as it is, so nothing is copied. ``weight`` is the packed one. What masks its input
    and multiplies densely (prompts, many rows) writes the weight out for the time of the product.

    Args: as :class:`SparseLinear`.
    """

    def __init__(
        self,
        linear: QuantisedLinear,
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
        form = linear.form
        self.weight = linear.packed
        self.dtype = linear.dtype
        self.channel_bytes = form.row_bytes(linear.out_features)
        self.rounded = QuantisedWeight(linear.packed, linear.scales, form.bits, form.group, linear.out_features)
        self._dense_weight = linear.dense_weight
        fits = self.out_features % COLUMNS == 0 and self.in_features <= MAX_CHANNELS and linear.dtype in HALF
        self._counters = counters if fits else None
        if triton:
            from was_kernels.quantised_gemv import quantised_gemv

            self._quantised_gemv = quantised_gemv

    @property
    def weight_t(self) -> Tensor:
        raise AttributeError("weight_t: rounded weights have none; see rounded")

    def restore_layout(self) -> None:
        """Nothing was changed."""

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self._dense_weight(x.dtype), self.bias)

    def _few_rows(self, x: Tensor, dense: Tensor | None) -> Tensor | None:
        rows = x.shape[0]
        if x.dtype != self.dtype:
            return None
        if self._counters is not None and rows <= MAX_ROWS_ROUNDED:
            return gather_gemv_quantised(
                x,
                [self.rounded],
                [self.norms],
                [self.threshold],
                [self.bias],
                self._counters,
                dense=dense,
                early=True,
            )
        if self._triton and rows <= MAX_ROWS:
            y: Tensor = self._quantised_gemv(x, self.rounded, self.norms, self.threshold, self.bias, dense)
            return y
        return None
