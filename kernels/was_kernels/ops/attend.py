"""Attention of one decoding step over a static cache, in one launch of CUDA C++ (``cuda/attend.cu``).

A torch custom op, so that ``torch.compile`` and CUDA graphs take it. On CPU it runs in plain torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.ops.attention_parts import AttentionParts
from was_kernels.ops.nvrtc import SOURCES, address, ceil_div, cuda_kernel
from was_kernels.ops.reference import rms_norm

HEAD_SIZES = (32, 64, 128, 256)
TILE_HEAD_SIZES = (64, 128)
MAX_TILE_QUERIES = 8
_LONG = 1024
_MAX_SPLITS = 64


class _Strides(ctypes.Structure):
    _fields_ = (("batch", ctypes.c_longlong), ("head", ctypes.c_longlong), ("position", ctypes.c_longlong))


@dataclass(frozen=True)
class AttendStep:
    """The inputs of one launch; keys, values and length are changed in place.

    Attributes:
        qkv: [B, (query_heads + 2 * heads) * head size], float16 or bfloat16: queries, keys and values side by side.
        keys: [B, heads, longest, head size] with unit last stride; the new key is written at ``length``.
        values: shaped like keys; the new value is written at ``length``.
        length: int64 scalar tensor, positions filled so far, fewer than longest; one more afterwards. A full cache
            ends the GPU's context with a trap: the length is never read on the host.
        cos: [B or 1, head size], rows contiguous, of the new position, in qkv's dtype.
        sin: shaped like cos.
        query_heads: a multiple of heads.
        scaling: factor of the scores.
        q_norm: [head size] or None: weight of an RMSNorm of each query head before the rotation.
        k_norm: [head size] or None: the same of each key head.
        epsilon: of both norms.
        mask: bool [B or 1, at least longest] with unit last stride: positions that may be seen; None: all.
    """

    qkv: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor
    cos: Tensor
    sin: Tensor
    query_heads: int
    scaling: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    epsilon: float = 0.0
    mask: Tensor | None = None

    def new_output(self) -> Tensor:
        """An uninitialised tensor for the result, [B, query_heads * head size]."""
        return self.qkv.new_empty((self.qkv.shape[0], self.query_heads * self.keys.shape[3]))


@dataclass(frozen=True)
class Walk:
    """How a launch goes through the cache's positions.

    Attributes:
        mma: by tiles on tensor cores; else by streams of threads.
        warps: of a block.
        unroll: positions of a stream in flight; 1 with mma.
        splits: blocks that share the positions of a row and key head.
        residents: blocks of a multiprocessor that registers are kept free for.
    """

    mma: bool
    warps: int
    unroll: int
    splits: int
    residents: int


def choose_walk(heads: int, queries: int, head: int, longest: int, processors: int) -> Walk:
    """The walk for ``heads`` key heads, of all rows, of ``queries`` query heads each, over ``longest`` positions.

    Measured on an H200: tiles are faster wherever a key is used more than once, and for one query from some thousand
    positions on.
    """
    if head in TILE_HEAD_SIZES and (queries > 1 or longest >= _LONG) and queries <= MAX_TILE_QUERIES:
        warps = 4 if longest <= 4 * _LONG else 8
        residents = 1024 // (head * warps)
        splits = min(ceil_div(longest, warps * 16), residents * processors // heads, _MAX_SPLITS)
        return Walk(True, warps, 1, max(1, splits), residents)
    warps, unroll = (8, 4) if queries == 1 else (8, 2) if queries <= 4 and head <= 128 else (4, 1)
    streams = warps * 32 * 8 // head
    # Enough splits that one round of every stream covers a usual cache, at most what fills the device once.
    splits = max(1, min(16, ceil_div(longest, streams * unroll), 2 * processors // heads))
    return Walk(False, warps, unroll, splits, 1)


def _launch(
    step: AttendStep, out: Tensor | None, workspace: Tensor | None, *, early: bool = False, advance: bool = False
) -> Tensor:
    """Compute the attention's parts, which are returned, and if ``out`` is given the attention itself, into ``out``.

    With ``advance`` the length becomes one more; otherwise whoever merges the parts does that.

    Raises:
        ValueError: ``workspace`` is on another device, or has no counter for each row and key head.
    """
    qkv, keys, values, cos, mask = step.qkv, step.keys, step.values, step.cos, step.mask
    rows, (_, heads, longest, head) = qkv.shape[0], keys.shape
    if workspace is not None and (workspace.device != qkv.device or len(workspace) <= rows * heads):
        raise ValueError(
            f"workspace: must be on {qkv.device} with qkv and have more than {rows * heads} counters, got "
            f"{len(workspace)} on {workspace.device}"
        )
    queries = step.query_heads // heads
    processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    walk = choose_walk(rows * heads, queries, head, longest, processors)
    splits = walk.splits
    parts = torch.empty((rows, heads, splits, queries, head + 2), dtype=torch.float32, device=qkv.device)
    early = early and torch.cuda.get_device_capability(qkv.device)[0] >= 9
    macros = {
        "BF16": int(qkv.dtype == torch.bfloat16),
        "HEAD": head,
        "QUERIES": queries,
        "WARPS": walk.warps,
        "UNROLL": walk.unroll,
        "MMA": int(walk.mma),
        "MIN_BLOCKS": walk.residents,
        "NORMED": int(step.q_norm is not None),
        "IN_PARTS": int(out is None),
        "PDL": int(early),
    }
    kernel = cuda_kernel(SOURCES / "attend.cu", "attend", macros, qkv.device.index or 0)
    size = qkv.element_size() * head
    arguments = [
        address(qkv),
        ctypes.c_void_p(qkv.data_ptr() + step.query_heads * size),
        ctypes.c_void_p(qkv.data_ptr() + (step.query_heads + heads) * size),
        address(cos),
        address(step.sin),
        address(step.q_norm),
        address(step.k_norm),
        address(keys),
        address(values),
        address(mask),
        address(step.length),
        address(out),
        address(parts),
        address(workspace),
        _Strides(*keys.stride()[:3]),
        _Strides(*values.stride()[:3]),
        ctypes.c_longlong(cos.stride(0) if cos.shape[0] > 1 else 0),
        ctypes.c_longlong(0 if mask is None or mask.shape[0] == 1 else mask.stride(0)),
        ctypes.c_longlong(qkv.stride(0)),
        ctypes.c_float(step.scaling),
        ctypes.c_float(step.epsilon),
        ctypes.c_int(heads),
        ctypes.c_int(longest),
        ctypes.c_int(advance),
    ]
    kernel.launch((rows * heads, splits), walk.warps * 32, arguments, overlap=early)
    return parts


def _reference(step: AttendStep) -> Tensor:
    """The attention in plain torch; writes the new key and value, and leaves the length as it is."""
    qkv, keys, values, length = step.qkv, step.keys, step.values, step.length
    rows, (_, heads, longest, head), query_heads = qkv.shape[0], keys.shape, step.query_heads
    q, k, v = torch.split(qkv.view(rows, -1, head), [query_heads, heads, heads], dim=1)
    if step.q_norm is not None and step.k_norm is not None:
        q, k = rms_norm(q, step.q_norm, step.epsilon), rms_norm(k, step.k_norm, step.epsilon)
    q, k = _rotated(q, step.cos, step.sin), _rotated(k, step.cos, step.sin)
    at = length.reshape(1)
    keys.index_copy_(2, at, k.unsqueeze(2))
    values.index_copy_(2, at, v.unsqueeze(2))
    seen = (torch.arange(longest, device=qkv.device) <= length).view(1, 1, 1, -1)
    if step.mask is not None:
        seen = seen & step.mask[:, None, None, :]
    groups = query_heads // heads
    wide_keys, wide_values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    out = F.scaled_dot_product_attention(q.unsqueeze(2), wide_keys, wide_values, attn_mask=seen, scale=step.scaling)
    return out.reshape(rows, query_heads * head)


@torch.library.custom_op(
    "was::attend",
    mutates_args=("keys", "values"),
    schema=(
        "(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor length, Tensor cos, Tensor sin, Tensor workspace, "
        "int query_heads, float scaling, Tensor? q_norm=None, Tensor? k_norm=None, float epsilon=0.0, "
        "Tensor? mask=None) -> Tensor"
    ),
)
def _attend_op(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    cos: Tensor,
    sin: Tensor,
    workspace: Tensor,
    query_heads: int,
    scaling: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    epsilon: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`attend` with its step laid out flat, as an op's schema must be; it leaves the length alone."""
    step = AttendStep(qkv, keys, values, length, cos, sin, query_heads, scaling, q_norm, k_norm, epsilon, mask)
    if not qkv.is_cuda:
        return _reference(step)
    out = step.new_output()
    _launch(step, out, workspace)
    return out


@_attend_op.register_fake
def _(qkv: Tensor, keys: Tensor, *_: Any, **__: Any) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]))  # without keys and values


def attend(step: AttendStep, workspace: Tensor, *, early: bool = False) -> Tensor:
    """The attention of one new token over a static cache: norms of heads, rotation, append and softmax in one launch.

    Positions after the new token are never used, whatever the cache holds there.

    Args:
        step: the inputs; their length is one more afterwards.
        workspace: from :func:`was_kernels.ops.gather_launch.new_workspace`.
        early: on Hopper and newer, start while the kernel before ends. Then that kernel must have made nothing but
            ``qkv``, and must itself have waited for the one before it: all else is read before it has ended. Not used
            in compiled graphs, whose kernels come in another order.

    Returns:
        [B, query_heads * head size].
    """
    if step.qkv.is_cuda and not torch.compiler.is_compiling():
        out = step.new_output()
        _launch(step, out, workspace, early=early, advance=True)
        return out
    # The op leaves the length alone: Inductor may compute what depends on it after an op that changes it in place.
    y: Tensor = torch.ops.was.attend(
        step.qkv,
        step.keys,
        step.values,
        step.length,
        step.cos,
        step.sin,
        workspace,
        step.query_heads,
        step.scaling,
        step.q_norm,
        step.k_norm,
        step.epsilon,
        step.mask,
    )
    step.length.add_(1)
    return y


def attend_in_parts(step: AttendStep, *, early: bool = False) -> AttentionParts:
    """:func:`attend` on a GPU without its last part: the parts are not merged, and the length stays as it is.

    The next launch does both (:func:`was_kernels.ops.gather_launch.launch_gather`): it reads every part once and
    waits for no block but its own. Not for compiled graphs.
    """
    return AttentionParts(_launch(step, None, None, early=early), step.length, step.qkv.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    other = torch.cat((-second, first), dim=-1)
    return (x.float() * cos[:, None].float() + other * sin[:, None].float()).to(x.dtype)
