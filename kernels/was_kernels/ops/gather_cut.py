"""How a launch of the CUDA sparse GEMV is cut into blocks, shares of the channels and lanes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from was_kernels.ops.nvrtc import ceil_div

WARPS = 8
"""Warps of a block."""

_STRIPE = 32
_SHARED_BYTES = (48 << 10) - 768  # shared memory that every device gives without asking, less the kernel's small arrays


@dataclass(frozen=True)
class Cut:
    """How a group of projections is cut into blocks.

    Attributes:
        lanes: threads along a weight row.
        per_lane: columns of each lane.
        blocks: column blocks of each projection.
        shares: blocks along the input channels.
        capacity: channels of a block, rounded up to whole passes of its threads.
        rows: rows of x that the kernel is compiled for.
        unroll: weight rows in flight for each group of lanes.
        residents: blocks that a multiprocessor holds.
        mma: whether products run on tensor cores, whose tiles have 8 rows of x.
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
def choose_cut(d_in: int, widths: tuple[int, ...], rows: int, n_processors: int, bits: int = 16) -> Cut:
    """The cut that fills every multiprocessor once, as evenly as whole blocks allow.

    A weight row's piece is 512 bytes where that still leaves enough blocks, else 256. A block has at least as many
    channels as threads, so that scoring them is one pass. Three and more rows of 16-bit weights are
    products of tensor cores; two are faster without.
    At 8 and 4 bits a lane reads up to 16 bytes of as many columns as the registers have sums for.
    """
    mma = rows > 2 and bits == 16
    compiled_rows = next(n for n in ((8, 16) if mma else (1, 2, 4, 8)) if n >= rows)
    residents = {8: 3, 16: 2}[compiled_rows] if mma else {1: 4, 2: 3, 4: 2, 8: 2}[compiled_rows]
    wide = compiled_rows == 1 or mma
    columns = 256 if wide and sum(ceil_div(width, 256) for width in widths) >= 32 else 128
    per_lane = 8 if bits == 16 else max(8, min(128 // bits, 32 // compiled_rows))
    unroll = 5 if compiled_rows == 1 else 8  # of one row, 5 were measured to be faster than 4, 6 and 8
    if bits < 16:  # leaves registers for the sums: of 32 columns at 4 bits, of two rows of 16
        residents, unroll = {1: 3 if bits == 4 else 4}.get(compiled_rows, 2), 4
    lanes = columns // per_lane
    blocks = tuple(ceil_div(width, columns) for width in widths)
    threads = WARPS * 32
    shares = max(1, min(d_in // threads, residents * n_processors // sum(blocks)))
    if mma:  # half-precision inputs and the list; the sums take their place
        most = (_SHARED_BYTES // (2 + 2 * compiled_rows) - 2 * threads) // threads * threads
    else:
        channel_bytes = 2 + 4 * compiled_rows  # its number and its inputs
        sums_bytes = 4 * (WARPS + compiled_rows) * columns  # a float of each column for each warp, and of the share's
        first_bytes = WARPS * unroll * (32 // lanes) * channel_bytes if bits == 16 else 0  # of the warps' own lists
        most = (_SHARED_BYTES - sums_bytes - first_bytes) // channel_bytes // threads * threads
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
