"""What the plug-in for vLLM knows of it without importing it: names, batches, and what cannot be served."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from was_search.errors import ConfigError
from was_search.shape import PROJECTIONS, SHARED

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj$")
PLAN_TENSORS = re.compile(r"^((norms|scales|constants)\.\d+\.\w+|sparsities|thresholds)$")
"""Names of a plan's own tensors, which lie beside the weights."""

_FUSED = {"qkv": SHARED[0], "gate_up": SHARED[2]}


def projections_of(prefix: str) -> tuple[int, tuple[int, ...]] | None:
    """The block and the projections that the linear map called ``prefix`` holds, in the order of its rows.

    None where it is none of a block's seven projections.
    """
    found = _LAYER.search(prefix)
    if found is None:
        return None
    block, name = int(found[1]), found[2]
    if name in PROJECTIONS:
        return block, (PROJECTIONS.index(name),)
    return (block, _FUSED[name]) if name in _FUSED else None


def require_served(config: Any, online: Any) -> None:
    """Refuse what a plan cannot be served with.

    Args:
        config: a ``VllmConfig``.
        online: vLLM's settings for quantisation while it loads, or None.

    Raises:
        ConfigError: naming it.
    """
    parallel = config.parallel_config
    refused = {
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "LoRA": config.lora_config is not None,
        "a speculative drafter": config.speculative_config is not None,
        "another quantisation": online is not None,
    }
    reasons = {
        "tensor parallelism": "masks and norms are those of whole projections; serve it with --tensor-parallel-size 1",
        "pipeline parallelism": "a process must hold all blocks; serve it with --pipeline-parallel-size 1",
        "LoRA": "thresholds were found without an adapter; serve it without --enable-lora",
        "a speculative drafter": "steps that check several tokens are dense; serve it without --speculative-config",
        "another quantisation": "thresholds are for the weights as stored; serve it without --quantization-config",
    }
    for name, is_there in refused.items():
        if is_there:
            raise ConfigError(f"a plan is not served with {name}: {reasons[name]}")


@dataclass(frozen=True)
class Batch:
    """What a plan's linear maps do with a batch.

    Attributes:
        one_token: every request has one token, so the batch is a decoding step.
        dense: bool [requests]: requests whose token lies in the plan's dense prefix; None where none does.
    """

    one_token: bool
    dense: Tensor | None = None


def batch_of(metadata: Any, rows: int, prefix: int, *, piecewise: bool) -> Batch:
    """What is done with a batch of ``rows`` tokens.

    Dense are prompts and batches that hold a part of one; batches without attention, as in vLLM's own measuring; and
    what runs from CUDA graphs of the parts between attentions, which are kept for prompts and steps alike.

    Args:
        metadata: the forward context's ``attn_metadata``: the attention's, by layers; a list of such; or None.
        rows: tokens, padding with them.
        prefix: positions that the plan leaves dense; a prompt of one token lies there.
        piecewise: the batch is run from, or captured into, such graphs.
    """
    one = next(iter(metadata.values()), None) if isinstance(metadata, dict) else None
    if one is None or piecewise or not _one_token_each(one):
        return Batch(False)
    lengths = getattr(one, "seq_lens", None)
    if prefix == 0 or lengths is None:
        return Batch(True)
    dense = lengths[:rows] <= prefix
    if dense.shape[0] != rows:
        return Batch(False)
    return Batch(True, None if dense.device.type == "cpu" and not bool(dense.any()) else dense)


def _one_token_each(metadata: Any) -> bool:
    longest = getattr(metadata, "max_query_len", None)
    if longest is not None:
        return bool(longest == 1)
    counts = [getattr(metadata, name, None) for name in ("num_prefills", "num_decodes", "num_decode_tokens")]
    return None not in counts and counts[0] == 0 and counts[1] == counts[2]
