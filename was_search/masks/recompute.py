"""Keep one block's activations at a time in a backward pass: gradient checkpointing around every decoder block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint

from was_search.checkpoints.structure import Structure


@contextmanager
def recomputed_blocks(structure: Structure, enabled: bool = True) -> Iterator[None]:
    """While open, each block stores its inputs only and runs its forward again in the backward pass.

    Memory falls from that of all blocks' activations to one block's and L inputs; time rises by one forward.
    Hooks on modules inside a block run twice, so nothing may be counted in them.
    """
    if not enabled:
        yield
        return
    modules = [block.module for block in structure.blocks]
    # A model that is spread over devices has a forward of its own on each module, which moves what comes in.
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = _recomputed(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _recomputed(forward: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
