"""Products with kept columns and whole one-token steps on a CPU, by C++ that is compiled where it runs.

``y[b] = sum over kept j of x[b, j] * W[:, j]``, summed in float32: the kept columns are cut into a fixed number of
parts, so that the bits do not depend on the number of threads. W is as stored, or rounded. Masks are those of
:func:`was_kernels.ops.column_bags.cutoffs`; a bias or a correction is added in float32, and the result rounded once.
The source is ``cpu/compiled_step.cpp``; the structures here are those there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.column_weight import ColumnWeight
from was_kernels.ops.correction import Correction
from was_kernels.ops.host_compiler import SOURCES, host_library

MOST_ROWS = 8
"""Rows of a whole step; products take any number."""

_NUMBERS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
DTYPES = tuple(_NUMBERS)

_LINE, _PAGE = 64, 4096
"""Bytes of a cache line, and after which lines compete for the same few places of a first-level cache."""


class _Map(ctypes.Structure):
    _fields_ = (
        ("columns", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("cutoffs", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("constant", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("list", ctypes.c_int64),
    )


class _Group(ctypes.Structure):
    _fields_ = (("maps", ctypes.POINTER(_Map)), ("count", ctypes.c_int64), ("d", ctypes.c_int64))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "output_norm", "query_norm", "key_norm")),
        *((f"{name}_epsilon", ctypes.c_float) for name in ("input", "output", "query", "key")),
        *((name, _Group) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "inner", "heads", "key_heads", "size")),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((f"key_{name}", ctypes.c_int64) for name in ("row", "head", "position")),
        *((f"value_{name}", ctypes.c_int64) for name in ("row", "head", "position")),
    )


class _Mask(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("kind", ctypes.c_int64))


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "cosines", "sines", "caches", "dense")),
        *((name, ctypes.c_int64) for name in ("rows", "angle_stride", "position")),
        ("mask", _Mask),
    )


@dataclass(frozen=True)
class KeptMap:
    """A linear map that reads the columns of kept channels only.

    Attributes:
        weight: W, rounded, or as stored in the inputs' dtype; its columns may then lie apart.
        cutoffs: the least magnitude of each channel that is kept, [d] in the inputs' dtype; None: all are kept.
        bias: [width] in the same dtype, or None.
        correction: of the rows that are not dense; None: they are not corrected.
    """

    weight: ColumnWeight
    cutoffs: Tensor | None
    bias: Tensor | None = None
    correction: Correction | None = None


def spaced(columns: Tensor) -> Tensor:
    """A copy of columns [d, width] that are not a multiple of 4 KB apart, with unit last stride.

    Several columns are read side by side; at such distances their lines push each other out of the cache.
    """
    d, width = columns.shape
    gap = _LINE // columns.element_size() if width * columns.element_size() % _PAGE == 0 else 0
    return columns.new_empty((d, width + gap))[:, :width].copy_(columns)


class KeptGroup:
    """Linear maps of one input, as the compiled code takes them; equal masks are listed once.

    Args:
        maps: of one d; their tensors are kept alive, and must stay where they are.
        dtype: of inputs, outputs, cutoffs, biases and weights as stored: float32, bfloat16 or float16.

    Raises:
        ValueError: they differ, or a tensor has another dtype, shape or layout than :class:`KeptMap` says.
    """

    def __init__(self, maps: Sequence[KeptMap], dtype: torch.dtype) -> None:
        self.d: int = maps[0].weight.columns.shape[0]
        self.dtype = dtype
        self.width = 0
        self._kept_alive: list[Any] = [maps]
        self.maps = (_Map * len(maps))()
        wide: list[Tensor | None] = []
        for i, given in enumerate(maps):
            self._require(given)
            # A mask is found in float32, where the cutoffs of every dtype are exact.
            wide.append(None if given.cutoffs is None else given.cutoffs.float().contiguous())
            correction, weight = given.correction, given.weight
            entry = self.maps[i]
            entry.columns, entry.scales = weight.columns.data_ptr(), _address(weight.scales)
            entry.cutoffs = _address(wide[i])
            entry.bias = _address(given.bias)
            entry.scale = None if correction is None else correction.scale.data_ptr()
            entry.constant = None if correction is None else correction.constant.data_ptr()
            entry.width, entry.stride = weight.width, weight.columns.stride(0)
            entry.bits, entry.group = weight.bits, weight.group
            entry.list = next(at for at in range(i + 1) if _same(wide[at], wide[i]))
            self.width += entry.width
        self._kept_alive.append(wide)
        self.struct = _Group(ctypes.cast(self.maps, ctypes.POINTER(_Map)), len(maps), self.d)

    def _require(self, given: KeptMap) -> None:
        weight = given.weight
        if self.dtype not in _NUMBERS or weight.columns.is_cuda:
            raise ValueError(
                f"columns: float32, bfloat16 or float16 on a CPU needed, got {self.dtype} on {weight.columns.device}"
            )
        weight.require(self.d, self.dtype)
        for name, vector, length in (("cutoffs", given.cutoffs, self.d), ("bias", given.bias, weight.width)):
            if vector is None or (vector.shape == (length,) and vector.dtype == self.dtype and vector.is_contiguous()):
                continue
            raise ValueError(
                f"{name}: contiguous {self.dtype} [{length}] needed, got {vector.dtype} {list(vector.shape)}"
            )
        if given.correction is not None:
            given.correction.require(weight.width)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its weight, contiguous and of the model's dtype, and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class StepBlock:
    """A block of a decoder: norm, attention, add, norm, gated MLP, add.

    Attributes:
        norms: before the attention and before the MLP, [hidden].
        head_norms: of queries and keys, [head size]; None: they have none.
        qkv: three maps.
        out: one map.
        gate_up: two maps.
        down: one map.
    """

    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    qkv: KeptGroup
    out: KeptGroup
    gate_up: KeptGroup
    down: KeptGroup


class StepModel:
    """A decoder's blocks and last norm, as the compiled code takes them.

    Args:
        blocks: in their order.
        norm: after the last block.
        head_size: of queries, keys and values.
        scaling: what scores are multiplied by.
    """

    def __init__(self, blocks: Sequence[StepBlock], norm: Norm, *, head_size: int, scaling: float) -> None:
        self._kept_alive = blocks, norm
        self._blocks = (_Block * len(blocks))()
        for entry, block in zip(self._blocks, blocks, strict=True):
            entry.input_norm, entry.output_norm = (each.weight.data_ptr() for each in block.norms)
            entry.input_epsilon, entry.output_epsilon = (each.epsilon for each in block.norms)
            if block.head_norms is not None:
                entry.query_norm, entry.key_norm = (each.weight.data_ptr() for each in block.head_norms)
                entry.query_epsilon, entry.key_epsilon = (each.epsilon for each in block.head_norms)
            entry.qkv, entry.out = block.qkv.struct, block.out.struct
            entry.gate_up, entry.down = block.gate_up.struct, block.down.struct
        first = blocks[0]
        self.hidden, self.dtype, self.head_size = first.qkv.d, first.qkv.dtype, head_size
        self.struct = _Model(
            blocks=ctypes.cast(self._blocks, ctypes.POINTER(_Block)),
            norm=norm.weight.data_ptr(),
            count=len(blocks),
            hidden=self.hidden,
            inner=first.down.d,
            heads=first.out.d // head_size,
            key_heads=(first.qkv.width - first.out.d) // (2 * head_size),
            size=head_size,
            epsilon=norm.epsilon,
            scaling=scaling,
        )


class StepCaches:
    """Keys and values of every block, [B, key heads, longest, head size] with unit last stride each.

    They are not kept alive: whoever holds this holds no memory of a cache that is done with.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.structs = (_Cache * len(pairs))()
        for entry, (keys, values) in zip(self.structs, pairs, strict=True):
            entry.keys, entry.values = keys.data_ptr(), values.data_ptr()
            entry.key_row, entry.key_head, entry.key_position, _ = keys.stride()
            entry.value_row, entry.value_head, entry.value_position, _ = values.stride()


class CompiledStep:
    """The compiled code for one dtype.

    Args:
        dtype: float32, bfloat16 or float16.
        folder: where compiled libraries are kept; None: nowhere.

    Attributes:
        openmp: the address of a function of the OpenMP runtime that runs its threads.
        lanes: numbers that are taken at once.

    Raises:
        was_kernels.ops.host_compiler.HostCompilerError: nothing can be compiled or loaded here.
    """

    def __init__(self, dtype: torch.dtype, folder: Path | None) -> None:
        self.dtype = dtype
        library = host_library(SOURCES / "compiled_step.cpp", {"NUMBER": _NUMBERS[dtype]}, folder)
        self._products = library.was_products
        self._products.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
        )
        self._dense = library.was_dense
        self._dense.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
        )
        self._write_out = library.was_write_out
        self._write_out.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._write_out.restype = None
        self._decode = library.was_decode
        self._decode.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        library.was_openmp.restype = ctypes.c_void_p
        self.openmp: int = library.was_openmp()
        self.lanes: int = library.was_lanes()

    def products(self, group: KeptGroup, x: Tensor, dense: Tensor | None = None) -> Tensor:
        """The maps' outputs for x, side by side.

        Args:
            group: maps of this dtype.
            x: [B, d] of this dtype, on a CPU.
            dense: bool [B]: rows that keep every channel and are not corrected; None: none are.

        Returns:
            [B, sum of widths] in x's dtype.

        Raises:
            ValueError: x or dense has another dtype or shape.
            MemoryError: there is too little memory.
        """
        rows = x.shape[0]
        if x.dtype != self.dtype or x.shape != (rows, group.d) or group.dtype != self.dtype:
            raise ValueError(f"x: {self.dtype} [B, {group.d}] needed, got {x.dtype} {list(x.shape)}")
        if dense is not None:
            if dense.shape != (rows,) or dense.dtype != torch.bool:
                raise ValueError(f"dense: bool [{rows}] needed, got {dense.dtype} {list(dense.shape)}")
            dense = dense.contiguous()
        x = x.contiguous()
        y = torch.empty((rows, group.width), dtype=self.dtype)
        if not rows:
            return y
        failed = self._products(
            ctypes.addressof(group.struct), x.data_ptr(), _address(dense), rows, y.data_ptr(), torch.get_num_threads()
        )
        if failed:
            raise MemoryError(f"a product of {rows} rows with {group.d} x {group.width} weights")
        return y

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product of x [B, d] with all of a weight [width, d] that lies by rows: [B, width], summed in float32.

        Raises:
            ValueError: x or the weight has another dtype, shape or layout.
            MemoryError: there is too little memory.
        """
        (rows, d), width = x.shape, weight.shape[0]
        if {x.dtype, weight.dtype} != {self.dtype} or weight.shape != (width, d) or weight.stride(1) != 1:
            raise ValueError(
                f"x, weight: {self.dtype} [B, d] and [width, d] with unit last stride needed, got {x.dtype} "
                f"{list(x.shape)} and {weight.dtype} {list(weight.shape)} with strides {weight.stride()}"
            )
        x = x.contiguous()
        y = torch.empty((rows, width), dtype=self.dtype)
        given = weight.data_ptr(), weight.stride(0), x.data_ptr(), rows, d, y.data_ptr(), width
        if self._dense(*given, torch.get_num_threads()):
            raise MemoryError(f"a product of {rows} rows with {width} x {d} weights")
        return y

    def written_out(self, weight: ColumnWeight) -> Tensor:
        """The numbers that a rounded weight stands for, [d, width], as :meth:`ColumnWeight.written_out` has them.

        Raises:
            ValueError: the weight is not rounded, or not on a CPU.
        """
        if weight.scales is None:
            raise ValueError(f"weight: a rounded one needed, got {weight.columns.dtype} as stored")
        group = KeptGroup([KeptMap(weight, None)], self.dtype)
        y = torch.empty((group.d, weight.width), dtype=self.dtype)
        self._write_out(ctypes.addressof(group.maps), group.d, y.data_ptr(), torch.get_num_threads())
        return y

    def decode(
        self,
        model: StepModel,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: StepCaches,
        position: int,
        *,
        mask: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Tensor:
        """The decoder's output for one token a row; its key and value are written at ``position`` of each cache.

        Args:
            model: of this dtype, whose heads are a multiple of :attr:`lanes` long.
            x: embedded tokens, [B, hidden], up to :data:`MOST_ROWS` rows.
            angles: cosines and sines, [B or 1, 1, head size], the sines of the first half negative.
            caches: with room at ``position``.
            position: how many positions are filled.
            mask: [B or 1, 1, 1, more than ``position``]: bool, true for what is seen, or added to scores; None: all is.
            dense: bool [B]: rows that keep every channel and are not corrected; None: none are.

        Returns:
            [B, hidden], after the last norm.

        Raises:
            MemoryError: there is too little memory.
        """
        x, rows = x.contiguous(), x.shape[0]
        cosines, sines = (each.contiguous() for each in angles)
        step = _Step(
            x=x.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            caches=ctypes.addressof(caches.structs),
            rows=rows,
            angle_stride=0 if cosines.shape[0] == 1 else model.head_size,
            position=position,
        )
        if dense is not None:
            dense = dense.contiguous()
            step.dense = dense.data_ptr()
        if mask is not None:
            if mask.dtype not in (torch.bool, torch.float32, self.dtype):
                mask = mask.float()
            mask = mask[:, 0, 0] if mask.stride(3) == 1 else mask[:, 0, 0].contiguous()
            kind = 0 if mask.dtype == torch.bool else 1 if mask.dtype == torch.float32 else 2
            step.mask = _Mask(mask.data_ptr(), 0 if mask.shape[0] == 1 else mask.stride(0), kind)
        y = torch.empty_like(x)
        step.y = y.data_ptr()
        if self._decode(ctypes.addressof(model.struct), ctypes.addressof(step), torch.get_num_threads()):
            raise MemoryError(f"a step of {rows} rows at position {position}")
        return y


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or torch.equal(a.view(torch.int32), b.view(torch.int32))
