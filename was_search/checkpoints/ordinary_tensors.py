"""Tensors of a model that outlive the block in which they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Inside the block tensors are made as outside of ``torch.inference_mode()``, and without gradients.

    A tensor that is made in inference mode can never take part in a backward pass, nor be changed in place, when that
    mode has ended; a model's weights and buffers must not be such.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield
