"""A linear map with rounded weights, and a model whose projections are such maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from was_search.checkpoints.column_product import column_product
from was_search.checkpoints.rounding import dequantise, quantise
from was_search.weight_format import WeightFormat

if TYPE_CHECKING:
    from was_search.checkpoints.structure import Structure


class QuantisedLinear(nn.Module):
    """A frozen linear map whose weight is held in 8 or 4 bits, and which computes in the input's dtype.

    Gradients flow to the input. The weight is written out for the time of a forward or backward only.

    Args:
        linear: the map whose weight is rounded and whose bias is taken over; its weight is not kept.
        form: bits and group.
        device: where the rounded weight lives; None: where the linear's is.

    Attributes:
        packed: buffer, uint8 [in_features, bytes], from :func:`was_search.checkpoints.rounding.quantise`.
        scales: buffer, float16 [in_features, groups, 2]: scale and offset.
        dtype: that of the weight before rounding: what the model computes in.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, form: WeightFormat, device: torch.device | None = None) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.form = form
        self.dtype = linear.weight.dtype
        weight = linear.weight.detach()
        packed, scales = quantise(weight if device is None else weight.to(device), form)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = linear.bias
        if device is not None and self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().to(device), requires_grad=False)
        self.train(linear.training)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in ``dtype``, or in the model's dtype for None."""
        form = self.form
        weight = dequantise(self.packed, self.scales, form.bits, form.group, self.out_features)
        return weight.to(dtype or self.dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias
        return column_product(x, self.dense_weight(x.dtype).t(), self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, weights={self.form}"


class _Product(torch.autograd.Function):
    """The product x W^T; it keeps the rounded weight for the backward pass, not the one written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return column_product(x, linear.dense_weight(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.dense_weight(gradient.dtype), None


def quantise_projections(structure: Structure, form: WeightFormat, device: torch.device | None = None) -> None:
    """Replace the seven projections of every block by :class:`QuantisedLinear`, one at a time, in the model itself.

    ``structure`` describes the model before; find it again afterwards. Other weights (embeddings, norms, head) stay.

    Raises:
        ModelError: weights that are not finite.
    """
    for masked in structure.inputs():
        block = structure.blocks[masked.block]
        for linear in masked.linears:
            if not isinstance(linear, nn.Linear):
                continue
            path = next(path for path, module in block.module.named_modules() if module is linear)
            parent, _, leaf = path.rpartition(".")
            with torch.no_grad():
                rounded = QuantisedLinear(linear, form, device)
            setattr(block.module.get_submodule(parent), leaf, rounded)
            # The caller's structure still names the map; its weight is what takes the memory.
            for held in (block.projections, block.fused):
                for name in [name for name, module in held.items() if module is linear]:
                    held[name] = rounded  # type: ignore[index]
