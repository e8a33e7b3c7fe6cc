"""Launch the CUDA sparse GEMV (``cuda/gather_gemv.cu``): its arguments, macros and workspaces."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.attention_parts import AttentionParts
from was_kernels.ops.gather_cut import WARPS, Cut, choose_cut
from was_kernels.ops.gather_step import GatherStep
from was_kernels.ops.nvrtc import SOURCES, address, cuda_kernel

_COUNTERS = 1 << 12
_SHARES = 1 << 22  # more than a step of 16 rows of a 7B needs, or one of 8 rows of a 70B


class _Projection(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("constant", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_longlong),
        ("threshold", ctypes.c_float),
        ("width", ctypes.c_int),
        ("first_block", ctypes.c_longlong),
        ("groups", ctypes.c_longlong),
    )


_GROUPS = {n: type(f"_Group{n}", (ctypes.Structure,), {"_fields_": (("part", _Projection * n),)}) for n in (1, 2, 3)}


def new_workspace(device: torch.device) -> Tensor:
    """Zeros, int32: where the ops count blocks that have arrived, and where blocks leave sums for one another.

    One for each model, whose launches are all in one stream; zeros again when a launch has ended.
    """
    return torch.zeros(_COUNTERS + _SHARES, dtype=torch.int32, device=device)


def launch_gather(
    step: GatherStep,
    workspace: Tensor,
    *,
    squares: Tensor | None = None,
    want_squares: bool = False,
    early: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run ``step`` on a GPU without its checks: for the launches of a fused block, each of which feeds the next.

    Args:
        step: x has a unit last stride and rows that start at multiples of 16 bytes; parts of attention are merged, and
            make their sequence one position longer.
        workspace: from :func:`new_workspace`.
        squares: float32 [B, n]: sums of the squares of parts of each row of x, from the launch that made x; so the
            RMSNorm need not read all of x in every block.
        want_squares: return sums of squares of the result, one part for each block of columns; takes one map.
        early: as in :func:`was_kernels.ops.gather_gemv.gather_gemv`.

    Returns:
        The result and, if wanted, the squares of its parts.

    Raises:
        ValueError: ``workspace`` is on another device.
    """
    x = step.x
    rows, d_in = x.shape
    first = step.maps[0].weight
    early = early and torch.cuda.get_device_capability(x.device)[0] >= 9
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut = choose_cut(d_in, tuple(sparse.weight.width for sparse in step.maps), rows, processors, first.bits)
    out = torch.empty((rows, step.width), dtype=x.dtype, device=x.device)
    n_blocks = sum(cut.blocks)
    if workspace.device != x.device:
        raise ValueError(
            f"workspace: must be on {x.device} with x, got {workspace.device}; a model that runs a plan must not be "
            "moved: restore() it first"
        )
    shares = workspace[_COUNTERS:]
    if (n_sums := n_blocks * cut.shares * cut.rows * cut.lanes * cut.per_lane) > len(shares):
        shares = torch.zeros(n_sums, dtype=torch.int32, device=x.device)
    own_squares = torch.empty((rows, n_blocks), dtype=torch.float32, device=x.device) if want_squares else None
    attended = x if isinstance(x, AttentionParts) else None
    plain = x if isinstance(x, Tensor) else None
    macros = {
        "BF16": int(x.dtype == torch.bfloat16),
        "MMA": int(cut.mma),
        "BITS": first.bits,
        "PER_LANE": cut.per_lane,
        "GROUP": first.group,
        "LANES": cut.lanes,
        "WARPS": WARPS,
        "UNROLL": cut.unroll,
        "ROWS": cut.rows,
        "PARTS": len(step.maps),
        "GATED": int(step.gated),
        "CORRECTED": int(step.corrected),
        "NORMED": 0 if step.norm_weight is None else 1 if squares is None else 2,
        "SHARES": cut.shares,
        "CAPACITY": cut.capacity,
        "MIN_BLOCKS": cut.residents,
        "PDL": int(early),
        **({} if attended is None else attended.macros),
    }
    kernel = cuda_kernel(SOURCES / "gather_gemv.cu", "gather_gemv", macros, x.device.index or 0)
    arguments = [
        address(plain),
        address(step.norm_weight),
        address(step.residual),
        address(step.dense),
        address(shares),
        address(None if attended is None else attended.parts),
        address(None if attended is None else attended.length),
        address(squares),
        address(own_squares),
        _group(step, cut, out),
        ctypes.c_longlong(0 if plain is None else plain.stride(0)),
        ctypes.c_longlong(out.stride(0)),
        ctypes.c_float(step.epsilon),
        ctypes.c_int(rows),
        ctypes.c_int(d_in),
        ctypes.c_int(0 if squares is None else squares.shape[1]),
    ]
    kernel.launch((n_blocks, cut.shares), WARPS * 32, arguments, overlap=early)
    return out, own_squares


def _group(step: GatherStep, cut: Cut, out: Tensor) -> Any:
    """The kernel's descriptions of the maps, which write side by side into ``out``; gated ones share their blocks."""
    group = _GROUPS[len(step.maps)]()
    first_block = first_column = 0
    for i, sparse in enumerate(step.maps):
        weight, scales = sparse.weight, sparse.weight.scales
        group.part[i] = _Projection(
            weight.columns.data_ptr(),
            None if scales is None else scales.data_ptr(),
            sparse.norms.data_ptr(),
            None if sparse.bias is None else sparse.bias.data_ptr(),
            None if sparse.correction is None else sparse.correction.scale.data_ptr(),
            None if sparse.correction is None else sparse.correction.constant.data_ptr(),
            out.data_ptr() + first_column * out.element_size(),
            weight.columns.stride(0),
            sparse.threshold,
            weight.width,
            first_block,
            0 if scales is None else scales.shape[1],
        )
        if not step.gated:
            first_block += cut.blocks[i]
            first_column += weight.width
    return group
