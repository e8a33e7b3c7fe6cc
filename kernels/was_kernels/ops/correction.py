"""A plan's compensation of one linear map: masked rows give ``scale * W x + constant``, not ``W x + bias``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correction:
    """What masked rows' products are multiplied by, and what is added to them afterwards.

    Attributes:
        scale: float32 [width] contiguous.
        constant: float32 [width] contiguous; the map's own bias, scaled, is a part of it.
    """

    scale: Tensor
    constant: Tensor

    @staticmethod
    def of(scale: Tensor, constant: Tensor, bias: Tensor | None) -> Correction:
        """That of ``scale * (W x + bias) + constant``, on the device of the two float32 vectors [width]."""
        if bias is not None:
            constant = torch.addcmul(constant, scale, bias.detach().to(constant))
        return Correction(scale.contiguous(), constant.contiguous())

    def require(self, width: int) -> None:
        """Check that the vectors belong to a map of ``width`` outputs.

        Raises:
            ValueError: they do not.
        """
        for name, vector in (("scale", self.scale), ("constant", self.constant)):
            if vector.shape != (width,) or vector.dtype != torch.float32 or not vector.is_contiguous():
                raise ValueError(
                    f"{name}: contiguous float32 [{width}] needed, got {vector.dtype} {list(vector.shape)}"
                )

    def applied(self, product: Tensor, bias: Tensor | None, dense: Tensor | None) -> Tensor:
        """The map's output, in the dtype of ``product``, rounded to it once.

        Args:
            product: W x, [..., width], which may be written over.
            bias: of the map, added where a row is dense.
            dense: bool, one flag per row: rows that are not masked; None: all are.
        """
        if torch.compiler.is_compiling() or product.requires_grad:
            corrected = torch.addcmul(self.constant, product, self.scale).to(product.dtype)
        else:  # one call, whose result is rounded as it is written
            out = product if dense is None else torch.empty_like(product)
            corrected = torch.addcmul(self.constant, product, self.scale, out=out)
        if dense is None:
            return corrected
        plain = product if bias is None else product + bias
        return torch.where(dense.reshape(*product.shape[:-1], 1), plain, corrected)
