"""One-token products on a CPU by torch alone: bags of kept columns or the dense product, whichever is faster.

They are taken where :mod:`was_kernels.runtime.compiled_code` finds no compiler, or what it compiles is slower.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from was_kernels.ops.column_bags import ColumnBags, KeptList
from was_kernels.runtime.compiled_product import most_worth
from was_kernels.runtime.held_weight import HeldWeight
from was_search.process.quickest import quickest

_most_kept: dict[tuple[Any, ...], int] = {}
"""What was measured in this process, by shape, dtype, threads and rows."""

_alike: dict[tuple[Any, ...], WeakSet[CpuProduct]] = {}
"""Products of one shape and dtype, whose weights take turns where they are timed: a step finds none in a cache."""


class CpuProduct:
    """The products of one held weight with few rows.

    Both ways are timed the first time that a shape is met with so many rows, threads and this dtype; the process keeps
    the answer, so that equal inputs give equal outputs from then on.

    Args:
        held: a weight on a CPU; one that is rounded has no bags.
    """

    def __init__(self, held: HeldWeight) -> None:
        self._held = held
        weight = held.columns.detached()
        self._d, self._width = weight.columns.shape[0], weight.width
        self._dtype = held.dtype
        # Columns that were spaced for compiled products cannot be cut; where those are slower, dense ones are taken.
        cut = weight.scales is None and weight.columns.is_contiguous()
        self._bags = ColumnBags(weight.columns, torch.get_num_threads()) if cut else None
        self._limits: dict[tuple[int, int], int] = {}
        self._kin = _alike.setdefault((self._d, self._width, self._dtype), WeakSet())
        self._kin.add(self)
        with torch.inference_mode(False):
            self._all = torch.arange(self._d)

    @staticmethod
    def takes(held: HeldWeight) -> bool:
        """Whether this weight lies by columns on a CPU."""
        columns = held.columns.columns
        return (columns.stride(1) == 1 or columns.is_contiguous()) and not columns.is_cuda

    def masked(self, x: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
        """The product of x [B, d], up to 16 rows, where ``keep``, bool [B, d] contiguous: [B, width]."""
        kept = KeptList.within(x, keep, self.most(x.shape[0], torch.get_num_threads()))
        return self.written(x, keep, bias) if kept is None else self.listed(kept, bias)

    def every(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product of x [B, d] with all channels."""
        if x.shape[0] > 1 or self.most(1, torch.get_num_threads()) < self._d:
            return self._held.multiply(x, bias)
        return self.listed(KeptList(self._all, x.reshape(-1), None), bias)

    def most(self, rows: int, threads: int) -> int:
        """How many kept channels of all rows together are worth bags; below zero where a list is never worth it."""
        if self._bags is None:
            return -1
        limit = self._limits.get((rows, threads))
        if limit is None:
            limit = self._limits[rows, threads] = self._measured(rows, threads)
        return limit

    def listed(self, kept: KeptList, bias: Tensor | None) -> Tensor:
        """The product by bags."""
        assert self._bags is not None
        y = self._bags.product(kept)
        return y if bias is None else y + bias

    def written(self, x: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
        """The dense product with dropped channels written as zeros."""
        return self._held.multiply(x.masked_fill(~keep, 0.0), bias)

    @torch.no_grad()
    def _measured(self, rows: int, threads: int) -> int:
        key = (self._d, self._width, self._dtype, threads, rows)
        if key not in _most_kept:
            x = torch.ones((rows, self._d), dtype=self._dtype)
            every = torch.ones((rows, self._d), dtype=torch.bool)
            turn = cycle(list(self._kin))
            dense, empty, full = quickest(
                lambda: next(turn).written(x, every, None),
                lambda: next(turn).listed(KeptList.of(x, ~every), None),
                lambda: next(turn).listed(KeptList.of(x, every), None),
            )
            _most_kept[key] = most_worth(dense, empty, full, rows * self._d)
        return _most_kept[key]
