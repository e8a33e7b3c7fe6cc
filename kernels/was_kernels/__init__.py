"""Sparse decoding: ops in CUDA, Triton and C++ for CPUs, and the runtime that applies a plan. This imports no triton.

It also tells transformers about checkpoints that carry a plan: ``AutoModelForCausalLM.from_pretrained`` then gives the
sparse model.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from was_kernels.plugin import register

if TYPE_CHECKING:
    from was_kernels.runtime.decoding_loop import DecodingLoop
    from was_kernels.runtime.sampling import Sampling
    from was_kernels.runtime.saved import load_sparse
    from was_kernels.runtime.sparse_linear import SparseLinear
    from was_kernels.runtime.sparse_model import SparseModel, sparsify
    from was_kernels.runtime.text_stream import TextStream

__all__ = [
    "DecodingLoop",
    "Sampling",
    "SparseLinear",
    "SparseModel",
    "TextStream",
    "load_sparse",
    "sparsify",
    "triton_available",
]

_LAZY = {
    "DecodingLoop": "was_kernels.runtime.decoding_loop",
    "Sampling": "was_kernels.runtime.sampling",
    "SparseLinear": "was_kernels.runtime.sparse_linear",
    "SparseModel": "was_kernels.runtime.sparse_model",
    "TextStream": "was_kernels.runtime.text_stream",
    "load_sparse": "was_kernels.runtime.saved",
    "sparsify": "was_kernels.runtime.sparse_model",
}


def triton_available() -> tuple[bool, str]:
    """Whether the Triton kernels can run here, and why (not) in one line; imports no triton."""
    import torch

    try:
        triton = f"triton {version('triton')}"
    except PackageNotFoundError:
        return False, "triton is not installed"
    if not torch.cuda.is_available():
        return False, f"{triton}, no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if torch.version.hip is None and major < 8:
        return False, f"{triton}, {name} has compute capability {major}.{minor}, at least 8.0 is needed"
    return True, f"{triton}, {name}"


register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
