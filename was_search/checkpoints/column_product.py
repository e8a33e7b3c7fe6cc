"""The dense product with a weight that lies by columns, as kernels have it and rounded weights are written out."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from was_search.process.quickest import quickest

_CLEARLY = 4.0
"""How many times as fast float32 has to be: some 75 on a CPU without AVX-512, below 1 on one that has it."""


def column_product(x: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of x with all of a weight.

    torch multiplies float16 on CPUs, and bfloat16 on those without instructions for it (AVX-512, AMX), number by number
    where a weight lies by columns. There the product is taken in float32, and rounded once.

    Args:
        x: [..., d].
        columns: [d, width], x's dtype.
        bias: [width], or None.

    Returns:
        [..., width] in x's dtype.
    """
    if x.device.type == "cpu" and x.dtype == columns.dtype and _is_widened(x.dtype):
        return F.linear(x.float(), columns.float().t(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, columns.t(), bias)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_widened(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are taken in float32 here; measured once a process where the CPU decides."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and _is_slow(dtype))


@lru_cache(maxsize=2)
@torch.no_grad()
def _is_slow(dtype: torch.dtype) -> bool:
    x, columns = torch.ones((16, 256), dtype=dtype), torch.ones((256, 256), dtype=dtype)
    own, wide = quickest(lambda: F.linear(x, columns.t()), lambda: F.linear(x.float(), columns.float().t()).to(dtype))
    return own > _CLEARLY * wide
