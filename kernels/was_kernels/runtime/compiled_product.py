"""Products of one input's linear maps on a CPU by compiled code, where there is a compiler and they are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from was_kernels.ops.compiled_step import CompiledStep, KeptGroup, KeptMap
from was_kernels.runtime.compiled_code import compiled_step
from was_kernels.runtime.held_weight import HeldWeight
from was_search.process.quickest import quickest

if TYPE_CHECKING:
    from was_kernels.runtime.sparse_linear import SparseLinear

_most_kept: dict[tuple[Any, ...], int] = {}
"""What was measured in this process, by shapes, dtype, threads and rows."""

_alike: dict[tuple[Any, ...], WeakSet[CompiledProduct]] = {}
"""Products of the same shapes and dtype, whose weights take turns where they are timed: a step finds none cached."""


class CompiledProduct:
    """The products of linear maps of one input by one call.

    They and the dense products are timed the first time that such shapes are met with so many rows, threads and this
    dtype; the process keeps the answer, so that equal inputs give equal outputs from then on.

    Args:
        weights: of the maps, on a CPU, as stored or rounded.
        step: the compiled code for their dtype.
    """

    def __init__(self, weights: Sequence[HeldWeight], step: CompiledStep) -> None:
        self._weights = list(weights)
        self._step = step
        self._columns = [held.columns.detached() for held in weights]
        self._d: int = self._columns[0].columns.shape[0]
        self._built: tuple[Any, KeptGroup] | None = None
        self._limits: dict[tuple[int, int], int] = {}
        formats = tuple((columns.width, columns.bits, columns.group) for columns in self._columns)
        self._shapes = (self._d, formats, step.dtype)
        self._kin = _alike.setdefault(self._shapes, WeakSet())
        self._kin.add(self)

    @staticmethod
    def of(weights: Sequence[HeldWeight]) -> CompiledProduct | None:
        """Those of some weights; None where nothing can be compiled."""
        step = compiled_step(weights[0].dtype)
        return None if step is None else CompiledProduct(weights, step)

    def __call__(self, maps: Sequence[SparseLinear], x: Tensor, dense: Tensor | None) -> Tensor:
        """The outputs of the maps that hold these weights, side by side: [B, sum of widths].

        Args:
            maps: in the order of the weights.
            x: [B, d].
            dense: bool [B]: rows that keep every channel and are not corrected; None: none are.
        """
        return self._step.products(self.group(maps), x, dense)

    def group(self, maps: Sequence[SparseLinear]) -> KeptGroup:
        """The maps as the compiled code takes them, made anew where a mask, a bias or a correction is another one."""
        state = [each.state for each in maps]
        if self._built is None or self._built[0] != state:
            kept = [
                KeptMap(columns, each.cutoffs if each.threshold > 0.0 else None, _plain(each.bias), each.correction)
                for columns, each in zip(self._columns, maps, strict=True)
            ]
            self._built = state, KeptGroup(kept, self._step.dtype)
        return self._built[1]

    def is_worth(self, rows: int, threads: int, sparsity: float = 0.5) -> bool:
        """Whether this is faster than dense products, if rows drop this share of their channels, each for itself."""
        limit = self._limits.get((rows, threads))
        if limit is None:
            limit = self._limits[rows, threads] = self._measured(rows, threads)
        return (1.0 - sparsity**rows) * self._d <= limit

    @torch.no_grad()
    def _measured(self, rows: int, threads: int) -> int:
        """How many channels, of all rows together, are worth it; below zero where none is."""
        key = (*self._shapes, threads, rows)
        if key not in _most_kept:
            x = torch.ones((rows, self._d), dtype=self._step.dtype)
            every = torch.ones((rows, self._d), dtype=torch.bool)
            turn = cycle(list(self._kin))
            calls = (lambda: next(turn)._dense(x, every)), self._timed(x, 2.0), self._timed(x, 0.0)
            dense, empty, full = quickest(*calls)
            _most_kept[key] = most_worth(dense, empty, full, self._d)
        return _most_kept[key]

    def _timed(self, x: Tensor, cutoff: float) -> Callable[[], Any]:
        cutoffs = torch.full((self._d,), cutoff, dtype=self._step.dtype)
        each_group = ([KeptMap(columns, cutoffs) for columns in each._columns] for each in self._kin)
        turn = cycle([KeptGroup(maps, self._step.dtype) for maps in each_group])
        return lambda: self._step.products(next(turn), x)

    def _dense(self, x: Tensor, keep: Tensor) -> None:
        for held in self._weights:
            held.multiply(x.masked_fill(~keep, 0.0), None)


def most_worth(dense: float, empty: float, full: float, channels: int) -> int:
    """The most of ``channels`` whose columns are read no slower than ``dense``; -1 for none.

    Args:
        dense: seconds of the dense product.
        empty: seconds of a product with no channel.
        full: seconds of one with all; between the two they grow with the channels.
        channels: of the product with all.
    """
    if full <= dense:
        return channels
    return -1 if dense <= empty else int((dense - empty) / (full - empty) * channels)


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
