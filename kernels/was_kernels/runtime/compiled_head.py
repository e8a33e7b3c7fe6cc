"""A model's head on a CPU: the largest product of a small model's step, which no plan masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from was_kernels.ops.compiled_step import MOST_ROWS, CompiledStep
from was_kernels.runtime.compiled_code import compiled_step
from was_kernels.runtime.fused_forward import fuse
from was_search.process.quickest import quickest

_is_faster: dict[tuple[Any, ...], bool] = {}
"""What was measured in this process, by shape, dtype, threads and rows."""


class CompiledHead:
    """The product of a few rows with a linear map by compiled code, where it was measured to be faster.

    Args:
        head: without a bias, on a CPU, its weight by rows.
        step: the compiled code for its dtype.
    """

    def __init__(self, head: nn.Linear, step: CompiledStep) -> None:
        self._head = head
        self._step = step

    def forward(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """The head's output for x [..., d]: all but a few rows for inference through ``plain``."""
        if len(args) != 1 or given or not self._takes(args[0]):
            return plain(self._head, *args, **given)
        x, weight = args[0], self._head.weight.detach()
        rows = x.reshape(-1, weight.shape[1])
        if not self._is_worth(len(rows)):
            return plain(self._head, x)
        return self._step.dense(rows, weight).view(*x.shape[:-1], -1)

    def _takes(self, x: Tensor) -> bool:
        weight = self._head.weight
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not isinstance(x, Tensor):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        fits = x.dtype == weight.dtype == self._step.dtype and x.dim() > 0 and x.shape[-1] == weight.shape[1]
        return fits and weight.stride(1) == 1 and 0 < x.numel() <= MOST_ROWS * weight.shape[1]

    @torch.no_grad()
    def _is_worth(self, rows: int) -> bool:
        weight = self._head.weight
        key = (tuple(weight.shape), weight.dtype, torch.get_num_threads(), rows)
        if key not in _is_faster:
            x = torch.ones((rows, weight.shape[1]), dtype=weight.dtype)
            ours, usual = quickest(lambda: self._step.dense(x, weight), lambda: nn.functional.linear(x, weight))
            _is_faster[key] = ours < usual
        return _is_faster[key]


def compile_head(model: Any) -> nn.Module | None:
    """Let compiled code make the outputs of ``model``'s head; the head, or None where it stays as it is."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear or head.bias is not None or head.weight.device.type != "cpu":
        return None
    step = compiled_step(head.weight.dtype)
    if step is None:
        return None
    fuse(head, CompiledHead(head, step))
    return head
