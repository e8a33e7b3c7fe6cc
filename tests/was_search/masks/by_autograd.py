"""Passes of one sequence through plain autograd, which the fused passes are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from was_search.masks.masked_model import MaskedModel

Hook = Callable[[tuple[int, int], nn.Linear, Tensor, Tensor], Tensor]
"""Of (block, projection), its module, its input and its output; returns the output to go on with."""


def backward_through(masked: MaskedModel, sequence: np.ndarray, predicted: int, hook: Hook) -> None:
    """Backward of the summed nats of the last ``predicted`` tokens, every projection's output as ``hook`` says."""

    def hooked(key: tuple[int, int]) -> Any:
        return lambda linear, args, out: hook(key, linear, args[0], out)

    handles = [linear.register_forward_hook(hooked((b, p))) for b, p, linear in masked.structure.linears()]
    ids = torch.as_tensor(sequence)[None]
    logits = masked.model(input_ids=ids).logits[0]
    for handle in handles:
        handle.remove()
    n = len(sequence)
    nats = -F.log_softmax(logits, dim=-1)[torch.arange(n - 1), ids[0, 1:]]
    nats[n - 1 - predicted :].sum().backward()
