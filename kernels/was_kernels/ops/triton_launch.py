"""Where a Triton kernel may run: on CUDA tensors, or on CPU tensors under Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that the kernels take; everything is summed in float32."""

_INTERPRETED_PROCESSORS = 2
"""Processors that the interpreter pretends to have: few, so that small shapes take the split path too."""


def interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter (TRITON_INTERPRET=1 before triton's first import)."""
    return not isinstance(kernel, JITFunction)


def runs(kernel: Any, x: Tensor) -> bool:
    """Whether ``kernel`` can be launched on ``x``."""
    return x.is_cuda != interpreted(kernel) if x.device.type in ("cuda", "cpu") else False


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context that makes the device of ``x`` the current one, on which Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@lru_cache(maxsize=16)
def _cuda_processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device that holds ``x``."""
    return _cuda_processors(x.device.index) if x.is_cuda else _INTERPRETED_PROCESSORS
