"""Keep one block's activations at a time in a backward pass: gradient checkpointing around every decoder block.

It costs one more forward, so that it is left out where the activations of all blocks easily find room. The numbers are
the same to the bit either way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from was_search.checkpoints.structure import Structure, device_of

_SHARE = 0.25
"""Share of a GPU's free memory that activations may take: several workers may share one."""


def activations_fit(model: Any, structure: Structure, tokens: int) -> bool:
    """Whether a backward pass over ``tokens`` tokens at once can keep the activations of all blocks of ``model``.

    They are estimated from above: input and output of each linear map twice, six copies of the hidden state in float32.
    Never where attention holds its scores (``eager``), or on a CPU, whose memory others need.
    """
    if getattr(model.config, "_attn_implementation", None) == "eager":
        return False
    width, shape = model.get_input_embeddings().weight.element_size(), structure.shape
    needed: Counter[torch.device] = Counter()
    for block, read, written in zip(structure.blocks, shape.in_features, shape.out_features, strict=True):
        values = 2 * width * (sum(read) + sum(written)) + 6 * 4 * read[0]
        needed[device_of(next(iter(block.projections.values())))] += tokens * values
    return all(size <= _SHARE * _free_bytes(device) for device, size in needed.items())


def _free_bytes(device: torch.device) -> int:
    """What this process can still take of a GPU's memory; 0 of other devices."""
    if device.type != "cuda":
        return 0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


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
        # A model that is evaluated draws nothing, so that no generator's state is kept, which a CUDA graph could not.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
