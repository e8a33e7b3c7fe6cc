"""What a decoding step does around its blocks, in one launch each of CUDA C++ (``cuda/step_ends.cu``).

Embeddings, angles of the rotation and flags of dense tokens before the first block; the norm after the last one.
Custom ops like :mod:`was_kernels.ops.gather_gemv`; on CPU they run in plain torch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.ops import reference
from was_kernels.ops.nvrtc import SOURCES, address, ceil_div, cuda_kernel

_THREADS = 256


def _kernel(name: str, dtype: torch.dtype, device: torch.device, early: bool) -> Any:
    early = early and torch.cuda.get_device_capability(device)[0] >= 9
    macros = {"BF16": int(dtype == torch.bfloat16), "THREADS": _THREADS, "PDL": int(early)}
    return cuda_kernel(SOURCES / "step_ends.cu", name, macros, device.index or 0), early


@torch.library.custom_op("was::begin_step", mutates_args=())
def _begin_step_op(
    tokens: Tensor, table: Tensor, positions: Tensor, frequencies: Tensor, scaling: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not tokens.is_cuda:
        rows = len(tokens)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = ((wave * scaling).to(table.dtype) for wave in (angles.cos(), angles.sin()))
        hidden = F.embedding(tokens, table)
        squares = hidden.float().square().sum(1, keepdim=True)
        return hidden, cos, sin, (positions < prefix).expand(rows).contiguous(), squares
    return _begin_on_gpu(tokens, table, positions, frequencies, scaling, prefix)


def _begin_on_gpu(
    tokens: Tensor, table: Tensor, positions: Tensor, frequencies: Tensor, scaling: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, (vocabulary, d), (angle_rows,) = len(tokens), table.shape, positions.shape
    hidden = torch.empty((rows, d), dtype=table.dtype, device=tokens.device)
    cos = torch.empty((angle_rows, 2 * len(frequencies)), dtype=table.dtype, device=tokens.device)
    sin, dense = torch.empty_like(cos), torch.empty(rows, dtype=torch.bool, device=tokens.device)
    pieces = ceil_div(d, 8 * _THREADS)
    squares = torch.empty((rows, pieces), dtype=torch.float32, device=tokens.device)
    # The launch after this one may start early; this one waits for all before it.
    kernel, _ = _kernel("begin_step", table.dtype, tokens.device, True)
    arguments = [
        address(tokens),
        address(table),
        address(positions),
        address(frequencies),
        address(hidden),
        address(cos),
        address(sin),
        address(dense),
        address(squares),
        ctypes.c_longlong(tokens.stride(0)),
        ctypes.c_longlong(positions.stride(0) if angle_rows > 1 else 0),
        ctypes.c_longlong(prefix),
        ctypes.c_float(scaling),
        ctypes.c_int(rows),
        ctypes.c_int(vocabulary),
        ctypes.c_int(d),
        ctypes.c_int(len(frequencies)),
        ctypes.c_int(angle_rows),
    ]
    kernel.launch((rows, pieces), _THREADS, arguments)
    return hidden, cos, sin, dense, squares


@_begin_step_op.register_fake
def _(
    tokens: Tensor, table: Tensor, positions: Tensor, frequencies: Tensor, scaling: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cos = table.new_empty((positions.shape[0], 2 * frequencies.shape[0]))
    dense = tokens.new_empty(tokens.shape[0], dtype=torch.bool)
    pieces = ceil_div(table.shape[1], 8 * _THREADS) if tokens.is_cuda else 1
    squares = tokens.new_empty((tokens.shape[0], pieces), dtype=torch.float32)
    return table.new_empty((tokens.shape[0], table.shape[1])), cos, torch.empty_like(cos), dense, squares


def begin_step(
    tokens: Tensor, table: Tensor, positions: Tensor, frequencies: Tensor, *, scaling: float = 1.0, prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, angles and flags of one new token a row.

    Args:
        tokens: int64 [B]; one outside of the table ends the process's use of the device, as embeddings do.
        table: [vocabulary, d], contiguous, float16 or bfloat16 on a GPU, d a multiple of 8.
        positions: int64 [B] or [1].
        frequencies: float32 [head size / 2], contiguous: radians a position.
        scaling: of cosines and sines.
        prefix: tokens at positions under it are dense.

    Returns:
        ``table[tokens]`` [B, d]; cosines and sines [B or 1, head size] in the table's dtype, both halves alike; flags
        of dense rows, bool [B]; sums of squares of parts of each row of the embeddings, float32 [B, n].
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.was.begin_step(
        tokens, table, positions, frequencies, scaling, prefix
    )
    return found


@torch.library.custom_op("was::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, epsilon: float, early: bool = False) -> Tensor:
    if not x.is_cuda:
        return reference.rms_norm(x, weight, epsilon)
    return _norm_on_gpu(x.contiguous(), weight, epsilon, early)


def _norm_on_gpu(x: Tensor, weight: Tensor, epsilon: float, early: bool) -> Tensor:
    out = torch.empty_like(x)
    kernel, early = _kernel("rms_norm", x.dtype, x.device, early)
    arguments = [address(x), address(weight), address(out), ctypes.c_float(epsilon), ctypes.c_int(x.shape[1])]
    kernel.launch((len(x), 1), _THREADS, arguments, overlap=early)
    return out


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float, early: bool = False) -> Tensor:
    return torch.empty_like(x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, early: bool = False) -> Tensor:
    """RMSNorm of each row of x [B, d], d a multiple of 8, as Llama's: in float32, rounded before the weight.

    With ``early``, on Hopper and newer, it starts while the kernel before ends; that one must have made nothing but x.
    """
    y: Tensor = torch.ops.was.rms_norm(x, weight, epsilon, early)
    return y
