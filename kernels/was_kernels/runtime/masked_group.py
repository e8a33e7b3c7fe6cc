"""Masked linear maps of one input on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from was_kernels.ops.column_bags import KeptList
from was_kernels.ops.column_weight import MAX_ROWS
from was_kernels.ops.compiled_step import KeptGroup
from was_kernels.runtime.compiled_product import CompiledProduct
from was_kernels.runtime.sparse_linear import SparseLinear


class MaskedGroup:
    """Linear maps of one input: all by one call of compiled code, or by torch, with one comparison for all masks.

    Args:
        maps: with bags each.
        sparsity: the share of their channels that rows drop, about.
    """

    def __init__(self, maps: list[SparseLinear], sparsity: float = 0.5) -> None:
        self._maps = [(m.bags, m, m.correction) for m in maps if m.bags is not None]
        self._widths = [m.out_features for m in maps]
        self._compiled = CompiledProduct.of([m.held for m in maps])
        self._sparsity = sparsity
        self._least: Tensor | None = None
        self._of: list[int | None] = []

    def __call__(self, x: Tensor, dense: Tensor | None, *, skip: bool = True) -> list[Tensor]:
        """The output of each map for x [B, d]; flagged rows, bool [B], or all if not ``skip``, are dense."""
        y = self._at_once(x, dense, skip)
        return self._one_by_one(x, dense, skip) if y is None else list(torch.split(y, self._widths, 1))

    def beside(self, x: Tensor, dense: Tensor | None, *, skip: bool = True) -> Tensor:
        """The outputs that a call gives, side by side: [B, sum of widths]."""
        y = self._at_once(x, dense, skip)
        if y is not None:
            return y
        products = self._one_by_one(x, dense, skip)
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def compiles(self, rows: int, *, skip: bool = True) -> bool:
        """Whether compiled code makes steps of so many rows, being faster; dense ones of a single row only."""
        if self._compiled is None or rows > (MAX_ROWS if skip else 1):
            return False
        return self._compiled.is_worth(rows, torch.get_num_threads(), self._sparsity if skip else 0.0)

    def _at_once(self, x: Tensor, dense: Tensor | None, skip: bool) -> Tensor | None:
        if self._compiled is None or not self.compiles(x.shape[0], skip=skip):
            return None
        flags = dense if skip else x.new_ones(x.shape[0], dtype=torch.bool)
        return self._compiled([held for _, held, _ in self._maps], x, flags)

    def _one_by_one(self, x: Tensor, dense: Tensor | None, skip: bool) -> list[Tensor]:
        if not skip:
            return [bags.every(x, held.bias) for bags, held, _ in self._maps]
        keeps = self._keeps(x, dense)
        lists: list[KeptList | None] = [None] * len(keeps)
        rows, threads = x.shape[0], torch.get_num_threads()
        found = []
        for (bags, held, correction), of in zip(self._maps, self._of, strict=True):
            bias = held.bias if correction is None else None
            if of is None:
                y = bags.every(x, bias)
            else:
                most = bags.most(rows, threads)
                kept = lists[of]
                if kept is None:
                    kept = lists[of] = KeptList.within(x, keeps[of], most)
                if kept is not None and len(kept) <= most:
                    y = bags.listed(kept, bias)
                else:
                    y = bags.written(x, keeps[of], bias)
            found.append(y if correction is None else correction.applied(y, held.bias, dense))
        return found

    def kept(self) -> KeptGroup:
        """The maps as compiled code takes them, where :meth:`compiles` may say so."""
        assert self._compiled is not None
        return self._compiled.group([held for _, held, _ in self._maps])

    def forget(self) -> None:
        """Find masks' cutoffs anew: norms were written over."""
        self._least = None
        self._of.clear()

    def _keeps(self, x: Tensor, dense: Tensor | None) -> tuple[Tensor, ...]:
        """The masks that differ, bool [B, d] each."""
        if not self._of:
            self._find_cutoffs()
        if self._least is None:
            return ()
        keep = torch.ge(x.abs(), self._least)
        if dense is not None:
            keep |= dense[:, None]
        return keep.unbind(0)

    def _find_cutoffs(self) -> None:
        distinct: list[Tensor] = []
        for _, held, _ in self._maps:
            if held.threshold <= 0.0:
                self._of.append(None)
                continue
            same = (i for i, other in enumerate(distinct) if _same_bits(other, held.cutoffs))
            at = next(same, len(distinct))
            if at == len(distinct):
                distinct.append(held.cutoffs)
            self._of.append(at)
        if distinct:
            with torch.inference_mode(False):
                self._least = torch.stack(distinct)[:, None]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
