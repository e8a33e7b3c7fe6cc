"""Block-output error under masks: what the component-level greedy (TEAL, WAS) minimises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from was_search.masks.histogram import Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.shape import FloatArray
from was_search.texts.protocol import TokenSet

BlockInputs = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of one block's forward, positional and by name, a pair for each batch."""


@torch.inference_mode()
def capture_inputs(model: MaskedModel, data: TokenSet, block: int) -> BlockInputs:
    """Inputs of ``block`` in the dense model on ``data``; kept on the model's device."""
    captured: BlockInputs = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append((args, kwargs))
        raise _StopForwardError

    handle = model.structure.blocks[block].module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in model.batches(data):
            try:
                getattr(model.model, "model", model.model)(input_ids=batch, use_cache=False)
            except _StopForwardError:
                continue
    finally:
        handle.remove()
    return captured


class _StopForwardError(Exception):
    """Ends a forward once the block's input is known: later blocks need not run."""


def block_error(model: MaskedModel, data: TokenSet, block: int, dense: Histograms) -> Callable[[FloatArray], float]:
    """A function of the seven sparsities: ``||y_sparse - y|| / ||y||`` of the block's output (TEAL section 4.3).

    The block's inputs are those of the dense model on ``data``. The norm is taken over the tokens outside the dense
    prefix; float32 accumulation.
    """
    inputs = capture_inputs(model, data, block)
    one, module = model.block(block), model.structure.blocks[block].module
    histograms, dense_prefix = Histograms(dense.counts[block : block + 1]), data.protocol.dense_prefix

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
        with Masking(one, thresholds, dense_prefix=dense_prefix):
            sparse = outputs()
        off = sum(float((s - y).square().sum()) for s, y in zip(sparse, reference, strict=True))
        return float((off / max(scale, 1e-30)) ** 0.5)

    return error
