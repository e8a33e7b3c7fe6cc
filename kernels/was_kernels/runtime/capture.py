"""CUDA graphs of calls, and what is left in order where a call cannot be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class CaptureError(RuntimeError):
    """A call did what a graph cannot hold, such as waiting for the device; its message is one line."""


def captured(
    call: Callable[[], T], device: torch.device, *, pool: Any = None, generator: torch.Generator | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what ``call`` launches on ``device``, and what it returned; nothing is run yet.

    Args:
        call: made once, while its launches are recorded. What it changes on the host is changed.
        device: a CUDA device.
        pool: of the memory that the graph uses, from ``torch.cuda.graph_pool_handle``; None: one of its own.
        generator: of random draws in ``call``, besides the device's own.

    Raises:
        CaptureError: with the first line of CUDA's or torch's reason.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        if generator is not None:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = call()
        except RuntimeError as error:
            _settle(generator)
            raise CaptureError(f"no graph could be captured ({str(error).splitlines()[0]})") from error
    return graph, result


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where the parameters and buffers of ``model`` lie: a graph reads them where they lay when it was captured."""
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))


def _settle(generator: torch.Generator | None) -> None:
    """After a failed capture torch's generators take themselves for captured still; a good one puts that right."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
