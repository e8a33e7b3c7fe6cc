"""Sparse projections of one decoding step that share an input, in one launch of CUDA C++ (``cuda/gather_gemv.cu``).

A torch custom op, so that ``torch.compile`` and CUDA graphs take it. On CPU it is plain torch of the same meaning.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.nvrtc import SOURCES, address, ceil_div, cuda_kernel
from was_kernels.quantised_weight import QuantisedWeight
from was_kernels.reference import rms_norm, sparse_gemv_reference

MAX_ROWS = 8
"""Rows of x that one launch takes."""

MAX_CHANNELS = 1 << 16
HALF = (torch.float16, torch.bfloat16)

_WARPS = 8
_STRIPE = 16
_MAX_PARTS = 3
_COUNTERS = 1 << 12
_SHARED_BYTES = (48 << 10) - 768  # what every device gives without asking, less the kernel's small arrays


class _Projection(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_longlong),
        ("threshold", ctypes.c_float),
        ("width", ctypes.c_int),
        ("first_block", ctypes.c_longlong),
        ("groups", ctypes.c_longlong),
    )


_GROUPS = {n: type(f"_Group{n}", (ctypes.Structure,), {"_fields_": (("part", _Projection * n),)}) for n in (1, 2, 3)}


@dataclass(frozen=True)
class Cut:
    """How a group of projections is cut into blocks.

    Attributes:
        lanes: threads along a weight row.
        per_lane: columns of each.
        blocks: column blocks of each projection.
        shares: blocks along the input channels.
        capacity: channels of a block, rounded up to whole passes of its threads.
        rows: of x that the kernel is compiled for.
        unroll: weight rows in flight for each group of lanes.
        residents: blocks that a multiprocessor holds.
    """

    lanes: int
    per_lane: int
    blocks: tuple[int, ...]
    shares: int
    capacity: int
    rows: int
    unroll: int
    residents: int


@lru_cache(maxsize=256)
def choose_cut(
    d_in: int, widths: tuple[int, ...], rows: int, n_processors: int, bits: int = 16, one_list: bool = False
) -> Cut:
    """Fill every multiprocessor once, as evenly as whole blocks allow.

    A weight row's piece is 512 bytes where that still leaves enough blocks, else 256. A block has at least as many
    channels as threads, so that scoring them is one pass. At 8 and 4 bits a lane reads up to 16 bytes of as many
    columns as the registers have sums for. With ``one_list`` a block has half of its columns of gate and half of up:
    it is cut like one projection of both widths.
    """
    if one_list:
        widths = (sum(widths),)
    compiled_rows = next(n for n in (1, 2, 4, 8) if n >= rows)
    residents = {1: 4, 2: 3, 4: 2, 8: 2}[compiled_rows]
    columns = 256 if compiled_rows == 1 and sum(ceil_div(width, 256) for width in widths) >= 32 else 128
    per_lane = 8 if bits == 16 else max(8, min(128 // bits, 32 // compiled_rows))
    unroll = 8 if compiled_rows < 8 else 4
    if bits < 16:  # leaves registers for the sums: of 32 columns at 4 bits, of two rows of 16
        residents, unroll = {1: 3 if bits == 4 else 4}.get(compiled_rows, 2), 4
    lanes = columns // per_lane
    blocks = tuple(ceil_div(width, columns) for width in widths)
    threads = _WARPS * 32
    shares = max(1, min(d_in // threads, residents * n_processors // sum(blocks)))
    sums_bytes = 4 * _WARPS * columns  # a float of each column for each warp
    most = (_SHARED_BYTES - sums_bytes) // (2 + 4 * compiled_rows) // threads * threads
    shares = max(shares, ceil_div(d_in, most))
    channels = ceil_div(ceil_div(d_in, _STRIPE), shares) * _STRIPE
    return Cut(
        lanes=lanes,
        per_lane=per_lane,
        blocks=blocks,
        shares=shares,
        capacity=ceil_div(channels, threads) * threads,
        rows=compiled_rows,
        unroll=unroll,
        residents=residents,
    )


def counters(device: torch.device) -> Tensor:
    """Zeros that the ops count arrived blocks in, int32; one for each model, whose kernels run one after another."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def _launch_gather(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    arrived: Tensor,
    gated: bool,
    norm_weight: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    dense: Tensor | None,
    early: bool,
    one_list: bool = False,
    rounded: Sequence[QuantisedWeight] = (),
) -> Tensor:
    """``weights`` of 16 bits, or in their place those that are ``rounded``, all to one format."""
    rows, d_in = x.shape
    bits = rounded[0].bits if rounded else 16
    widths = tuple(weight.width for weight in rounded) or tuple(weight.shape[1] for weight in weights)
    scales: Sequence[Tensor | None] = [weight.scales for weight in rounded] or [None] * len(weights)
    weights = [weight.packed for weight in rounded] or weights
    early = early and torch.cuda.get_device_capability(x.device)[0] >= 9
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut = choose_cut(d_in, widths, rows, processors, bits, one_list)
    out = torch.empty((rows, widths[0] if gated else sum(widths)), dtype=x.dtype, device=x.device)
    n_blocks = sum(cut.blocks)
    if n_blocks > len(arrived):
        raise ValueError(f"arrived: {n_blocks} counters needed, got {len(arrived)}")
    columns = cut.lanes * cut.per_lane
    parts = torch.empty(n_blocks * cut.shares * cut.rows * columns, dtype=torch.float32, device=x.device)
    group = _GROUPS[len(weights)]()
    first_block = first_column = 0
    given = zip(weights, scales, norms, thresholds, biases, strict=True)
    for i, (weight, pairs, own, threshold, bias) in enumerate(given):
        group.part[i] = _Projection(
            weight.data_ptr(),
            None if pairs is None else pairs.data_ptr(),
            own.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr() + first_column * out.element_size(),
            weight.stride(0),
            threshold,
            widths[i],
            first_block,
            0 if pairs is None else pairs.shape[1],
        )
        if not gated:
            first_block += cut.blocks[i]
            first_column += widths[i]
    macros = {
        "BF16": int(x.dtype == torch.bfloat16),
        "BITS": bits,
        "PER_LANE": cut.per_lane,
        "GROUP": rounded[0].group if rounded else 1,
        "LANES": cut.lanes,
        "WARPS": _WARPS,
        "UNROLL": cut.unroll,
        "ROWS": cut.rows,
        "PARTS": len(weights),
        "GATED": int(gated),
        "ONE_LIST": int(one_list),
        "NORMED": int(norm_weight is not None),
        "CAPACITY": cut.capacity,
        "MIN_BLOCKS": cut.residents,
        "PDL": int(early),
    }
    kernel = cuda_kernel(SOURCES / "gather_gemv.cu", "gather_gemv", macros, x.device.index or 0)
    arguments = [
        address(x),
        address(norm_weight),
        address(residual),
        address(dense),
        address(parts),
        address(arrived),
        group,
        ctypes.c_longlong(x.stride(0)),
        ctypes.c_longlong(out.stride(0)),
        ctypes.c_float(epsilon),
        ctypes.c_int(rows),
        ctypes.c_int(d_in),
    ]
    kernel.launch((n_blocks, cut.shares), _WARPS * 32, arguments, overlap=early)
    return out


def gather_gemv_reference(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """What :func:`gather_gemv` computes, in plain torch."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, epsilon)
    outs = [
        sparse_gemv_reference(x, weight.t(), own, threshold, bias, dense)
        for weight, own, threshold, bias in zip(weights, norms, thresholds, biases, strict=True)
    ]
    y = F.silu(outs[0]) * outs[1] if gated else torch.cat(outs, dim=1)
    return y if residual is None else residual + y


@torch.library.custom_op(
    "was::gather_gemv",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] weights, Tensor[] norms, float[] thresholds, Tensor?[] biases, Tensor arrived, "
        "bool gated=False, Tensor? norm_weight=None, float epsilon=0.0, Tensor? residual=None, Tensor? dense=None, "
        "bool early=False, bool one_list=False) -> Tensor"
    ),
)
def _gather_gemv_op(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    arrived: Tensor,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
    early: bool = False,
    one_list: bool = False,
) -> Tensor:
    _require_gather(x, weights, norms, thresholds, biases, gated, norm_weight, residual)
    if one_list and not (gated and thresholds[0] == thresholds[1] and norms[0].data_ptr() == norms[1].data_ptr()):
        raise ValueError("one_list: takes two gated weights with one threshold and one tensor of norms")
    if not x.is_cuda:
        return gather_gemv_reference(
            x, weights, norms, thresholds, biases, gated, norm_weight, epsilon, residual, dense
        )
    if x.stride(1) != 1 or x.stride(0) % 8 or x.storage_offset() % 8:
        x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    return _launch_gather(
        x, weights, norms, thresholds, biases, arrived, gated, norm_weight, epsilon, residual, dense, early, one_list
    )


@_gather_gemv_op.register_fake
def _(x: Tensor, weights: list[Tensor], *others: Any, gated: bool = False, **_: Any) -> Tensor:
    gated = others[4] if len(others) > 4 else gated
    widths = [weight.shape[1] for weight in weights]
    return x.new_empty((x.shape[0], widths[0] if gated else sum(widths)))


def gather_gemv(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    arrived: Tensor,
    *,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
    early: bool = False,
    one_list: bool = False,
) -> Tensor:
    """Sparse projections of one input in one launch: ``y_p = W_p[:, kept_p] x[kept_p] + bias_p``, side by side.

    Each projection and each row of x has its own mask: ``abs(x) * norms >= threshold`` in float32 (ties kept, NaN
    dropped, a threshold of zero or less keeps all). Weights of a channel that all rows drop are not read. Sums are
    float32 in a fixed order: the same inputs give the same bits on the same device.

    Args:
        x: [B, d_in], B up to 8, float16 or bfloat16; d_in up to 65,536.
        weights: up to three, each [d_in, width] with unit last stride, width a multiple of 8, rows that start at
            multiples of 16 bytes.
        norms: float32 [d_in] each.
        thresholds: one each, in the unit of ``abs(x) * norms``.
        biases: [width] or None each.
        arrived: from :func:`counters`; not to be shared by kernels that may run at once.
        gated: the result is ``silu(y_0) * y_1``; takes two projections of one width.
        norm_weight: [d_in], a multiple of 8: x goes through RMSNorm with this weight first, as Llama's.
        epsilon: of the RMSNorm.
        residual: like the result; added to it.
        dense: bool [B]: rows that keep every channel.
        early: on Hopper and newer, start while the kernel before ends. Then that kernel must have made nothing but
            ``x``; norms and ``norm_weight`` are read before it has ended.
        one_list: when gated, and both weights have one mask (one threshold, the same tensor of norms): list its
            channels once for both.

    Returns:
        [B, sum of widths], or [B, width] when gated.

    Raises:
        ValueError: shapes, dtypes or counts other than these.
    """
    y: Tensor = torch.ops.was.gather_gemv(
        x, weights, norms, thresholds, biases, arrived, gated, norm_weight, epsilon, residual, dense, early, one_list
    )
    return y


def _require_gather(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    gated: bool,
    norm_weight: Tensor | None,
    residual: Tensor | None,
) -> None:
    require_group(x, weights, norms, thresholds, biases, gated, norm_weight, residual)
    for weight in weights:
        if weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] % 8 or weight.stride(1) != 1:
            raise ValueError(
                f"weights: [{x.shape[1]}, a multiple of 8] with unit last stride, got {list(weight.shape)}"
            )
        if weight.stride(0) % 8 or weight.storage_offset() % 8:
            raise ValueError("weights: rows must start at multiples of 16 bytes")
        if weight.dtype != x.dtype:
            raise ValueError(f"weights: must have x's dtype {x.dtype}, got {weight.dtype}")


def require_group(
    x: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    thresholds: list[float],
    biases: list[Tensor | None],
    gated: bool,
    norm_weight: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Check what does not depend on how weights are held."""
    n = len(weights)
    if not 1 <= n <= _MAX_PARTS or not n == len(norms) == len(thresholds) == len(biases):
        raise ValueError(f"weights: one to three, as many norms, thresholds and biases, got {n} weights")
    if gated and (n != 2 or weights[0].shape != weights[1].shape or residual is not None):
        raise ValueError("gated: takes two weights of one shape and no residual")
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS or x.shape[1] > MAX_CHANNELS:
        raise ValueError(f"x: [1 to {MAX_ROWS}, up to {MAX_CHANNELS}] needed, got {list(x.shape)}")
    if norm_weight is not None and x.shape[1] % 8:
        raise ValueError(f"norm_weight: takes x of a multiple of 8 channels, got {x.shape[1]}")
    for own in norms:
        if own.shape != x.shape[1:] or own.dtype != torch.float32:
            raise ValueError(f"norms: float32 [{x.shape[1]}] needed, got {own.dtype} {list(own.shape)}")
