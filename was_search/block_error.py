"""Block-output error under masks: what the component-level greedy (TEAL, WAS) minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from was_search.histogram import Histograms
from was_search.masking import Masking
from was_search.score import MaskOp, mask_input
from was_search.shape import FloatArray, IntArray
from was_search.structure import Structure

BlockInputs = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of one block's forward, a pair a batch."""


@torch.inference_mode()
def capture_inputs(
    model: nn.Module, structure: Structure, block: int, tokens: IntArray, batch_size: int
) -> BlockInputs:
    """Inputs of ``block`` in the dense model on ``tokens`` [n, sequence_length]; kept on the model's device."""
    device = next(model.parameters()).device
    captured: BlockInputs = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise _StopForwardError

    handle = structure.blocks[block].module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for start in range(0, len(tokens), batch_size):
            batch = torch.as_tensor(tokens[start : start + batch_size], dtype=torch.long, device=device)
            try:
                getattr(model, "model", model)(input_ids=batch, use_cache=False)
            except _StopForwardError:
                continue
    finally:
        handle.remove()
    return captured


class _StopForwardError(Exception):
    """Ends a forward once the block's input is known: the blocks behind it need not run."""


def block_error(
    structure: Structure,
    norms: list[list[Tensor]],
    block: int,
    inputs: BlockInputs,
    dense: Histograms,
    *,
    dense_prefix: int,
    mask_op: MaskOp = mask_input,
) -> Callable[[FloatArray], float]:
    """A function of the seven sparsities: ``||y_sparse - y|| / ||y||`` of the block's output (TEAL section 4.3).

    The norm is taken over the tokens outside the dense prefix of all ``inputs``; float32 accumulation.
    """
    module = structure.blocks[block].module
    one = Structure((structure.blocks[block],), structure.masks)
    histograms = Histograms(dense.counts[block : block + 1])

    @torch.inference_mode()
    def outputs() -> list[Tensor]:
        found = []
        for args, kwargs in inputs:
            out = module(*args, **kwargs)
            found.append((out[0] if isinstance(out, tuple) else out)[:, dense_prefix:].float())
        return found

    reference = outputs()
    scale = sum(float(y.square().sum()) for y in reference)

    def error(sparsities: FloatArray) -> float:
        thresholds = histograms.thresholds(sparsities[None])
        with Masking(one, [norms[block]], thresholds, dense_prefix=dense_prefix, mask_op=mask_op):
            sparse = outputs()
        off = sum(float((s - y).square().sum()) for s, y in zip(sparse, reference, strict=True))
        return float((off / max(scale, 1e-30)) ** 0.5)

    return error
