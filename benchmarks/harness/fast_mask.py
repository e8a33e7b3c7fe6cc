"""Mask with thresholds that lie on the device, one for each sequence, and count what is dropped.

``y_sj = x_sj if abs(x_sj) * norm_j >= threshold_s else 0`` for sequence s. ``was_kernels.ops.score_mask`` takes the
threshold as a number, which a CUDA graph freezes at its capture. Here the kernel reads it from memory, so that one
graph serves every vector, and several at once. Positions inside the dense prefix keep all channels. The semantics are
those of ``was_search.masks.score.masked``, but for NaN inputs at a threshold of 0.
"""

# No `from __future__ import annotations` here: Triton's interpreter reads the annotations of a kernel.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-unimported"

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

from was_search.masks.masked_model import MaskedModel
from was_search.masks.score import or_zero, scores

_BLOCK = 2048

Observer = Callable[[int, int, Tensor], None]
"""(block, projection, scores [n, positions, d] float32 outside the dense prefix) -> None."""


@triton.jit
def _device_mask_kernel(
    x_ptr,  # [sequences, positions, d] contiguous
    norms_ptr,  # [d] float32
    thresholds_ptr,  # [sequences] float32
    y_ptr,  # like x
    dropped_ptr,  # [sequences] int32
    n,  # positions * d
    d,
    dense_prefix,
    thresholds_stride,
    dropped_stride,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    position = at // d
    x = tl.load(x_ptr + sequence * n + at, mask=there, other=0.0)
    norms = tl.load(norms_ptr + (at - position * d), mask=there, other=0.0)
    keep = tl.abs(x.to(tl.float32)) * norms >= tl.load(thresholds_ptr + sequence * thresholds_stride)
    keep = keep | (position < dense_prefix)
    tl.store(y_ptr + sequence * n + at, tl.where(keep, x, tl.zeros_like(x)), mask=there)
    dropped = tl.sum(tl.where(there & (keep == 0), 1, 0).to(tl.int32), axis=0)
    tl.atomic_add(dropped_ptr + sequence * dropped_stride, dropped, sem="relaxed")


def device_mask(x: Tensor, norms: Tensor, thresholds: Tensor, dense_prefix: int, dropped: Tensor) -> Tensor:
    """x [sequences, positions, d] with the channels under their sequence's threshold set to zero.

    On a GPU this is one Triton kernel, elsewhere plain torch (or Triton's interpreter, if it was asked for).

    Args:
        x: the input, of any float dtype.
        norms: float32 [d].
        thresholds: float32 [sequences], of any stride, on x's device.
        dense_prefix: positions that keep all channels.
        dropped: int32 [sequences], of any stride; the numbers of channels dropped are added to it.
    """
    if x.is_cuda == isinstance(_device_mask_kernel, JITFunction):
        source = x.contiguous()
        y = torch.empty_like(source)
        n = x.shape[1] * x.shape[2]
        _device_mask_kernel[(x.shape[0], triton.cdiv(n, _BLOCK))](
            source,
            norms,
            thresholds,
            y,
            dropped,
            n,
            x.shape[2],
            dense_prefix,
            thresholds.stride(0),
            dropped.stride(0),
            BLOCK=_BLOCK,
            num_warps=4,
        )
        return y
    keep = scores(x, norms) >= thresholds[:, None, None]
    keep[:, :dense_prefix] = True
    dropped += (~keep).sum(dim=(1, 2))
    return or_zero(keep, x)


@contextmanager
def masks(
    model: MaskedModel,
    thresholds: Tensor,
    dropped: Tensor,
    dense_prefix: int,
    observer: Observer | None = None,
) -> Iterator[None]:
    """While open, every input of the model's projections passes :func:`device_mask`.

    ``thresholds`` float32 and ``dropped`` int32 are [sequences, L, 7]. ``observer`` sees the scores before masking.
    """

    norms = model.norms

    def hook(b: int, p: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        def mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            if observer is not None:
                observer(b, p, scores(args[0][:, dense_prefix:], norms[b][p]))
            return (device_mask(args[0], norms[b][p], thresholds[:, b, p], dense_prefix, dropped[:, b, p]),)

        return mask

    handles = [linear.register_forward_pre_hook(hook(b, p)) for b, p, linear in model.structure.linears()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
