"""Products on a CPU that read the weights of kept channels only, by torch's embedding bags.

``y[b] = sum over kept j of x[b, j] * W[:, j]`` is a weighted bag of the rows of the transposed weight. A bag is summed
by one thread, so the outputs are cut into several bags: the weight [d, width] is seen as [d * bags, width / bags], of
which bag ``c`` takes the rows ``j * bags + c``. Each output is a sum over j in order, whatever the number of bags or
threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_BAG_WIDTH = 32
"""Outputs that a bag should have at least."""


@dataclass(slots=True)
class KeptList:
    """The kept channels of B rows, row after row.

    Attributes:
        channels: int64 [N].
        values: x at them, [N].
        starts: where each row begins, int64 [B]; None for a single row.
    """

    channels: Tensor
    values: Tensor
    starts: Tensor | None

    @staticmethod
    def of(x: Tensor, keep: Tensor) -> KeptList:
        """The list of x [B, d] where ``keep``, bool [B, d] contiguous."""
        rows, d = x.shape
        at = keep.view(-1).nonzero().view(-1)
        values = x.take(at)
        if rows == 1:
            return KeptList(at, values, None)
        counts = keep.sum(1)
        return KeptList(at.remainder_(d), values, counts.cumsum(0) - counts)

    @staticmethod
    def within(x: Tensor, keep: Tensor, most: int) -> KeptList | None:
        """The list as :meth:`of` gives it; None where it would hold more than ``most``."""
        if most < 0 or (x.shape[0] > 1 and int(keep.sum()) > most):  # a count is cheaper than a list of several rows
            return None
        kept = KeptList.of(x, keep)
        return kept if len(kept) <= most else None

    def __len__(self) -> int:
        return self.channels.shape[0]


class ColumnBags:
    """A weight cut into bags.

    Args:
        columns: [d, width], contiguous, float32, bfloat16 or float16.
        threads: threads that should share a row.
    """

    def __init__(self, columns: Tensor, threads: int) -> None:
        d, width = columns.shape
        self.bags = bags_of(width, threads)
        self._table = columns.view(d * self.bags, width // self.bags)
        self._lanes = _lanes(self.bags)

    def product(self, kept: KeptList) -> Tensor:
        """The product with the rows of ``kept``: [B, width] in their dtype, summed in float32."""
        bags, n = self.bags, len(kept)
        indices = torch.add(self._lanes, kept.channels, alpha=bags).view(-1)
        starts = kept.starts
        offsets = _offsets(bags, n) if starts is None else torch.add(starts, self._lanes, alpha=n).view(-1)
        values = kept.values if bags == 1 else torch.cat((kept.values,) * bags)
        y = torch.embedding_bag(self._table, indices, offsets, False, 0, False, values)[0]
        if starts is None:
            return y.view(1, -1)
        return y.view(bags, starts.shape[0], -1).transpose(0, 1).reshape(starts.shape[0], -1)


def bags_of(width: int, threads: int) -> int:
    """Into how many bags ``width`` outputs are cut: each thread should have one, and each bag 32 outputs."""
    most = max(1, width // _BAG_WIDTH)
    fitting = [bags for bags in range(1, min(most, 4 * threads) + 1) if width % bags == 0]
    return min(fitting, key=lambda bags: (-(-threads // bags), bags % threads != 0, bags))


def cutoffs(norms: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    """The least magnitude of each channel that is kept, so that a mask is one comparison without a product.

    ``abs(x) >= cutoffs`` is exactly ``abs(x) * norms >= threshold`` in float32: the product grows with ``abs(x)``, also
    after rounding, so the cutoffs are found by bisection over the numbers of ``dtype``.

    Args:
        norms: float32 [d], none negative.
        threshold: above zero.
        dtype: of x.

    Returns:
        [d] in ``dtype``; NaN, which keeps nothing, where no magnitude is large enough.
    """
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(whole))

    def reaches(bits: Tensor) -> Tensor:
        return bits.to(whole).view(dtype).float() * norms >= threshold

    guess = (threshold / norms).nan_to_num(torch.inf, torch.inf).to(dtype).view(whole).to(torch.int32)
    low, high = (guess - 8).clamp(min=-1), (guess + 8).clamp(max=infinity + 1)
    if bool(((low >= 0) & reaches(low.clamp(min=0)) | (high <= infinity) & ~reaches(high)).any()):
        low, high = torch.full_like(guess, -1), torch.full_like(guess, infinity + 1)
    # ``high`` reaches the threshold, or is beyond infinity and thereby NaN; ``low`` does not.
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        reached = reaches(middle.clamp(min=0)) & (middle >= 0)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high.to(whole).view(dtype)


def _number_table(values: list[int] | range) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(list(values))


@lru_cache(maxsize=64)
def _lanes(bags: int) -> Tensor:
    return _number_table(range(bags)).view(bags, 1)


@lru_cache(maxsize=1 << 16)
def _offsets(bags: int, n: int) -> Tensor:
    return _number_table([bag * n for bag in range(bags)])
