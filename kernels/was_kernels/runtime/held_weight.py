"""The weight of a linear map while it runs a plan: laid out for the kernels, and given back afterwards."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from was_kernels.ops.column_weight import ColumnWeight
from was_kernels.ops.compiled_step import spaced as spaced_columns
from was_kernels.runtime.compiled_code import compiled_step
from was_search.checkpoints.column_product import column_product
from was_search.checkpoints.quantised import QuantisedLinear
from was_search.checkpoints.structure import Projection


class HeldWeight(Protocol):
    """What :class:`was_kernels.runtime.sparse_linear.SparseLinear` knows of a weight."""

    @property
    def tensor(self) -> Tensor:
        """The tensor that the linear map holds: its parameter, or the packed buffer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the linear map computes in."""
        ...

    @property
    def columns(self) -> ColumnWeight:
        """The weight as the kernels read it, in the same memory."""
        ...

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The dense product with x [..., in_features]."""
        ...

    def restore(self) -> None:
        """Lay the weight out as it was, bit for bit."""
        ...


class StoredWeight:
    """A linear map's own parameter, whose identity, name and dtype stay; only its storage becomes column-major.

    One weight at a time exists twice, for the moment of the copy.

    Args:
        linear: its bias is left alone.
        spaced: for compiled products, see :func:`was_kernels.ops.compiled_step.spaced`; what is column-major already
            stays where it is.
    """

    def __init__(self, linear: nn.Linear, *, spaced: bool = False) -> None:
        self.tensor = linear.weight
        self.dtype = linear.weight.dtype
        columns = self.tensor.data.t()
        copied = spaced_columns(columns) if spaced and not columns.is_contiguous() else columns.contiguous()
        self.tensor.data = copied.t()

    @property
    def columns(self) -> ColumnWeight:
        return ColumnWeight.as_stored(self.tensor.t())

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return column_product(x, self.tensor.t(), bias)

    def restore(self) -> None:
        self.tensor.data = self.tensor.data.contiguous()


class RoundedWeight:
    """A packed weight, which is column-major as it is, so nothing is copied or has to be restored.

    Dense products write the weight out for the time that they take.
    """

    def __init__(self, linear: QuantisedLinear) -> None:
        form = linear.form
        self.tensor = linear.packed
        self.dtype = linear.dtype
        self.columns = ColumnWeight(linear.packed, linear.scales, form.bits, form.group, linear.out_features)
        self._dense_weight = linear.dense_weight

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        step = None if x.is_cuda or torch.compiler.is_compiling() else compiled_step(x.dtype)
        columns = self._dense_weight(x.dtype).t() if step is None else step.written_out(self.columns)
        return column_product(x, columns, bias)

    def restore(self) -> None:
        """Nothing to do, as nothing was changed."""


def hold(linear: Projection, *, spaced: bool = False) -> HeldWeight:
    """Take over the weight of ``linear``, which must not be used until it is restored."""
    return RoundedWeight(linear) if isinstance(linear, QuantisedLinear) else StoredWeight(linear, spaced=spaced)
