"""A linear map of a vLLM model as one opaque op, which decides while it runs what it does with a batch.

vLLM compiles a model once for batches of every kind, so no branch on the batch may stand in the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, str], Tensor]
"""The product of x [n, d_in] with the map of a name: [n, width]."""

_LIBRARY = torch.library.Library("was_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, str name, int width) -> Tensor")  # type: ignore[no-untyped-call]
_products: list[Product] = []


def made_by(product: Product) -> None:
    """Have ``product`` make what the op gives, in the place of what was named before."""
    _products[:] = [product]


def vllm_linear(x: Tensor, name: str, width: int) -> Tensor:
    """The product of x [n, d_in] with the map called ``name``: [n, width] in x's dtype.

    Raises:
        RuntimeError: nobody has said who makes products (:func:`made_by`).
    """
    y: Tensor = torch.ops.was_vllm.linear(x, name, width)
    return y


def _linear(x: Tensor, name: str, width: int) -> Tensor:
    if not _products:
        raise RuntimeError("was_vllm::linear: only a model that vLLM has loaded can be run")
    return _products[0](x, name)


def _shape_of_linear(x: Tensor, name: str, width: int) -> Tensor:
    return x.new_empty((x.shape[0], width))


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", _linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("was_vllm::linear", _shape_of_linear, lib=_LIBRARY)
