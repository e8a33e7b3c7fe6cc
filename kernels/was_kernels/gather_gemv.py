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

from was_kernels.attention_parts import AttentionParts
from was_kernels.nvrtc import SOURCES, address, ceil_div, cuda_kernel
from was_kernels.quantised_weight import QuantisedWeight
from was_kernels.reference import rms_norm, sparse_gemv_reference

MAX_ROWS = 16
"""Rows of x that one launch takes; of rounded weights half as many."""

MAX_ROWS_ROUNDED = 8

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
        mma: products on tensor cores, whose tiles have 8 rows of x.
    """

    lanes: int
    per_lane: int
    blocks: tuple[int, ...]
    shares: int
    capacity: int
    rows: int
    unroll: int
    residents: int
    mma: bool


@lru_cache(maxsize=256)
def choose_cut(
    d_in: int, widths: tuple[int, ...], rows: int, n_processors: int, bits: int = 16, one_list: bool = False
) -> Cut:
    """Fill every multiprocessor once, as evenly as whole blocks allow.

    A weight row's piece is 512 bytes where that still leaves enough blocks, else 256. A block has at least as many
    channels as threads, so that scoring them is one pass. Three and more rows of 16-bit weights are
    products of tensor cores; two are faster without.
    At 8 and 4 bits a lane reads up to 16 bytes of as many columns as the registers have sums for. With ``one_list`` a
    block has half of its columns of gate and half of up: it is cut like one projection of both widths.
    """
    if one_list:
        widths = (sum(widths),)
    mma = rows > 2 and bits == 16
    compiled_rows = next(n for n in ((8, 16) if mma else (1, 2, 4, 8)) if n >= rows)
    residents = {8: 3, 16: 2}[compiled_rows] if mma else {1: 4, 2: 3, 4: 2, 8: 2}[compiled_rows]
    wide = compiled_rows == 1 or mma
    columns = 256 if wide and sum(ceil_div(width, 256) for width in widths) >= 32 else 128
    per_lane = 8 if bits == 16 else max(8, min(128 // bits, 32 // compiled_rows))
    unroll = 8
    if bits < 16:  # leaves registers for the sums: of 32 columns at 4 bits, of two rows of 16
        residents, unroll = {1: 3 if bits == 4 else 4}.get(compiled_rows, 2), 4
    lanes = columns // per_lane
    blocks = tuple(ceil_div(width, columns) for width in widths)
    threads = _WARPS * 32
    shares = max(1, min(d_in // threads, residents * n_processors // sum(blocks)))
    if mma:  # half-precision inputs and the list; the sums take their place
        most = (_SHARED_BYTES // (2 + 2 * compiled_rows) - 2 * threads) // threads * threads
    else:
        sums_bytes = 4 * _WARPS * columns  # a float of each column for each warp
        most = (_SHARED_BYTES - sums_bytes) // (2 + 4 * compiled_rows) // threads * threads
    # A thread keeps its channels' inputs of all rows in registers while it scores them.
    most = min(most, threads * 64 // compiled_rows) if mma else most
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
        mma=mma,
    )


def counters(device: torch.device) -> Tensor:
    """Zeros that the ops count arrived blocks in, int32; one for each model, whose kernels run one after another."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def launch_gather(
    x: Tensor | AttentionParts,
    weights: Sequence[Tensor] | Sequence[QuantisedWeight],
    norms: Sequence[Tensor],
    thresholds: Sequence[float],
    biases: Sequence[Tensor | None],
    arrived: Tensor,
    *,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    squares: Tensor | None = None,
    residual: Tensor | None = None,
    dense: Tensor | None = None,
    early: bool = False,
    one_list: bool = False,
    want_squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`gather_gemv` on a GPU without its checks, as the launches of a fused block hand on to each other.

    Args:
        x: as there, or parts of attention, which are merged and make their sequence one position longer.
        weights: as there, or rounded ones, all of one format.
        squares: float32 [B, n]: sums of the squares of parts of each row of x, from the launch that made x; so the
            RMSNorm need not read all of x in every block.
        want_squares: of the result, one part for each block of columns; takes one projection.

    Returns:
        The result and, if wanted, the squares of its parts.
    """
    (rows, d_in), attended = x.shape, x if isinstance(x, AttentionParts) else None
    formats = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    stored = [weight.packed if isinstance(weight, QuantisedWeight) else weight for weight in weights]
    widths = tuple(weight.width for weight in formats) or tuple(weight.shape[1] for weight in stored)
    bits = formats[0].bits if formats else 16
    early = early and torch.cuda.get_device_capability(x.device)[0] >= 9
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut = choose_cut(d_in, widths, rows, processors, bits, one_list)
    out = torch.empty((rows, widths[0] if gated else sum(widths)), dtype=x.dtype, device=x.device)
    n_blocks = sum(cut.blocks)
    if arrived.device != x.device:
        raise ValueError(
            f"arrived: must be on {x.device} with x, got {arrived.device}; a model that runs a plan must not be moved: "
            "restore() it first"
        )
    if n_blocks > len(arrived):
        raise ValueError(f"arrived: {n_blocks} counters needed, got {len(arrived)}")
    columns = cut.lanes * cut.per_lane
    parts = torch.empty(n_blocks * cut.shares * cut.rows * columns, dtype=torch.float32, device=x.device)
    own_squares = torch.empty((rows, n_blocks), dtype=torch.float32, device=x.device) if want_squares else None
    group = _GROUPS[len(weights)]()
    first_block = first_column = 0
    for i, (weight, own, threshold, bias) in enumerate(zip(stored, norms, thresholds, biases, strict=True)):
        group.part[i] = _Projection(
            weight.data_ptr(),
            formats[i].scales.data_ptr() if formats else None,
            own.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr() + first_column * out.element_size(),
            weight.stride(0),
            threshold,
            widths[i],
            first_block,
            formats[i].scales.shape[1] if formats else 0,
        )
        if not gated:
            first_block += cut.blocks[i]
            first_column += widths[i]
    macros = {
        "BF16": int(x.dtype == torch.bfloat16),
        "MMA": int(cut.mma),
        "BITS": bits,
        "PER_LANE": cut.per_lane,
        "GROUP": formats[0].group if formats else 1,
        "LANES": cut.lanes,
        "WARPS": _WARPS,
        "UNROLL": cut.unroll,
        "ROWS": cut.rows,
        "PARTS": len(weights),
        "GATED": int(gated),
        "ONE_LIST": int(one_list),
        "NORMED": 0 if norm_weight is None else 1 if squares is None else 2,
        "SHARES": cut.shares,
        "CAPACITY": cut.capacity,
        "MIN_BLOCKS": cut.residents,
        "PDL": int(early),
        **({} if attended is None else attended.macros),
    }
    kernel = cuda_kernel(SOURCES / "gather_gemv.cu", "gather_gemv", macros, x.device.index or 0)
    arguments = [
        address(x if isinstance(x, Tensor) else None),
        address(norm_weight),
        address(residual),
        address(dense),
        address(parts),
        address(arrived),
        address(None if attended is None else attended.parts),
        address(None if attended is None else attended.length),
        address(squares),
        address(own_squares),
        group,
        ctypes.c_longlong(x.stride(0) if isinstance(x, Tensor) else 0),
        ctypes.c_longlong(out.stride(0)),
        ctypes.c_float(epsilon),
        ctypes.c_int(rows),
        ctypes.c_int(d_in),
        ctypes.c_int(0 if squares is None else squares.shape[1]),
    ]
    kernel.launch((n_blocks, cut.shares), _WARPS * 32, arguments, overlap=early)
    return out, own_squares


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
    return launch_gather(
        x,
        weights,
        norms,
        thresholds,
        biases,
        arrived,
        gated=gated,
        norm_weight=norm_weight,
        epsilon=epsilon,
        residual=residual,
        dense=dense,
        early=early,
        one_list=one_list,
    )[0]


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
        x: [B, d_in], B up to 16, float16 or bfloat16; d_in up to 65,536.
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
    max_rows: int = MAX_ROWS,
) -> None:
    """Check what does not depend on how weights are held."""
    n = len(weights)
    if not 1 <= n <= _MAX_PARTS or not n == len(norms) == len(thresholds) == len(biases):
        raise ValueError(f"weights: one to three, as many norms, thresholds and biases, got {n} weights")
    if gated and (n != 2 or weights[0].shape != weights[1].shape or residual is not None):
        raise ValueError("gated: takes two weights of one shape and no residual")
    if x.dim() != 2 or not 1 <= x.shape[0] <= max_rows or x.shape[1] > MAX_CHANNELS:
        raise ValueError(f"x: [1 to {max_rows}, up to {MAX_CHANNELS}] needed, got {list(x.shape)}")
    if norm_weight is not None and x.shape[1] % 8:
        raise ValueError(f"norm_weight: takes x of a multiple of 8 channels, got {x.shape[1]}")
    for own in norms:
        if own.shape != x.shape[1:] or own.dtype != torch.float32:
            raise ValueError(f"norms: float32 [{x.shape[1]}] needed, got {own.dtype} {list(own.shape)}")
