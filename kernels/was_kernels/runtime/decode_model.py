"""One-token steps of a decoder whose blocks are fused, without small kernels before the first and after the last.

transformers makes the angles, the causal mask and the norm of a step from some thirty operations on a few numbers. A
decoder whose class is known gets a subclass that takes such steps itself, as :mod:`was_kernels.runtime.decode_block`
does with its blocks, and leaves everything else to transformers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from was_kernels.ops.column_weight import MAX_ROWS
from was_kernels.ops.gather_step import HALF
from was_kernels.ops.step_ends import begin_step, rms_norm
from was_kernels.runtime.decode_block import DecodeBlock
from was_kernels.runtime.fused_forward import is_hooked
from was_kernels.runtime.growing_cache import filled, make_room
from was_kernels.runtime.positions import CACHES, DensePrefix

FAMILIES = {
    "LlamaModel": "transformers.models.llama.",
    "MistralModel": "transformers.models.mistral.",
    "Qwen2Model": "transformers.models.qwen2.",
    "Qwen3Model": "transformers.models.qwen3.",
}
"""Classes of decoders whose forward is: embed, angles and mask, blocks, norm; and where they must come from."""

_FIXED_ANGLES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotation whose frequencies do not depend on the sequence."""

_TAKEN = frozenset(
    ("input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "cache_position")
)


class DecodeModel:
    """What a decoder's one-token step needs, gathered once.

    Args:
        decoder: of a class in :data:`FAMILIES`, that :func:`fits`.
        steps: the steps of its blocks, in their order.
        prefix: tells which tokens are dense. It is kept up to date here: attach no hooks for it.
    """

    def __init__(self, decoder: Any, steps: list[DecodeBlock], prefix: DensePrefix | None) -> None:
        self._decoder = decoder
        self._steps = steps
        self._ends = (decoder.embed_tokens, decoder.rotary_emb, decoder.norm)
        self._prefix = prefix
        self._max_rows = min([MAX_ROWS, *(step.max_rows for step in steps)])
        self._frequencies: Tensor = decoder.rotary_emb.inv_freq.float().contiguous()
        self._scaling: float = float(decoder.rotary_emb.attention_scaling)
        self._names = tuple(inspect.signature(decoder.forward).parameters)

    @property
    def counts(self) -> bool:
        """Whether kept channels are counted, which blocks do not do themselves."""
        return self._steps[0].counts

    def prepared(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """``given`` as :meth:`run` takes it, or None where this forward is no step of ours.

        A dynamic cache has room for the new position afterwards; a mask of tokens becomes one of positions.
        """
        if not self.is_step(given):
            return None
        cache, mask = next(iter(cache_of(given).values()), None), mask_of(given)
        longest = longest_of(cache)
        if longest is None or not (mask is None or isinstance(mask, Tensor)):
            return None
        if mask is not None and mask.dim() == 2:
            if mask.shape[1] > longest or mask.shape[0] != given["input_ids"].shape[0]:
                return None
            mask = row_of_flags(mask, longest)
        like, rows = self._decoder.embed_tokens.weight, given["input_ids"].shape[0]
        hidden = like.new_empty((rows, 1, like.shape[1]))
        angles = like.new_empty((1, 2 * len(self._frequencies)))
        block = {**cache_of(given), "attention_mask": mask, "position_embeddings": (angles, angles)}
        if not all(step.takes(hidden, block) for step in self._steps):
            return None
        return {**given, "attention_mask": mask}

    def is_step(self, given: dict[str, Any]) -> bool:
        """Whether this is a one-token forward that leaves nothing to transformers, but for what its cache is like."""
        tokens, config = given.get("input_ids"), self._decoder.config
        if tokens is None or tokens.dim() != 2 or tokens.shape[1] != 1 or not 1 <= tokens.shape[0] <= self._max_rows:
            return False
        if tokens.dtype != torch.int64 or tokens.device != self._frequencies.device:
            return False
        if any(value is not None and value is not False for name, value in given.items() if name not in _TAKEN):
            return False
        wanted = ("output_attentions", "output_hidden_states")
        if any(getattr(config, name, False) for name in wanted) or not getattr(config, "return_dict", True):
            return False
        use_cache = given.get("use_cache")
        if not (config.use_cache if use_cache is None else use_cache):
            return False
        positions = given.get("position_ids")
        if positions is not None and (positions.shape[1:] != (1,) or positions.dtype != torch.int64):
            return False
        return given.get("return_dict") is not False and not is_hooked(self._ends)

    def run(self, given: dict[str, Any]) -> Any:
        """The decoder's output for one token a row; the cache is one position longer afterwards."""
        decoder, tokens = self._decoder, given["input_ids"]
        cache = next(iter(cache_of(given).values()))
        positions = given.get("position_ids")
        if positions is None:
            positions = filled(cache.layers[0]).cumulative_length
        x, cos, sin, dense, squares = begin_step(
            tokens[:, 0],
            decoder.embed_tokens.weight,
            positions.reshape(-1),
            self._frequencies,
            scaling=self._scaling,
            prefix=0 if self._prefix is None else self._prefix.prefix,
        )
        block = {**cache_of(given), "attention_mask": mask_of(given), "position_embeddings": (cos, sin)}
        prefixed: Tensor | None = dense if self._prefix is not None else None
        sums: Tensor | None = squares if x.is_cuda else None
        for step in self._steps:
            x, sums = step.step(x, block, prefixed, sums)
        norm = decoder.norm
        hidden = rms_norm(x, norm.weight, norm.variance_epsilon, early=True)[:, None]
        return BaseModelOutputWithPast(last_hidden_state=hidden, **cache_of(given))

    def forward(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """The decoder's forward: a step through :meth:`run`, all else through ``plain``, the class's own forward."""
        if not args and (step := self.prepared(given)) is not None:
            return self.run(step)
        if self._prefix is None:
            return plain(self._decoder, *args, **given)
        self._prefix.begin({**dict(zip(self._names, args, strict=False)), **given})
        try:
            return plain(self._decoder, *args, **given)
        finally:
            self._prefix.end()


def cache_of(given: dict[str, Any]) -> dict[str, Any]:
    """The cache, under the name that the installed transformers has for it."""
    return {name: given[name] for name in CACHES if given.get(name) is not None}


def mask_of(given: dict[str, Any]) -> Any:
    """The mask of blocks that see the whole cache; ``generate`` hands some decoders one for each kind of block."""
    mask = given.get("attention_mask")
    return mask["full_attention"] if isinstance(mask, dict) and list(mask) == ["full_attention"] else mask


def longest_of(cache: Any) -> int | None:
    """How many positions the blocks' kernels may find in ``cache``, after a dynamic one was given room; else None."""
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return None
    if all(isinstance(layer, DynamicLayer) for layer in layers) and (
        torch.compiler.is_compiling() or not make_room(cache)
    ):
        return None
    held = filled(layers[0])
    return None if held is None or not held.is_initialized else int(held.keys.shape[2])


def row_of_flags(mask: Tensor, longest: int) -> Tensor:
    """A mask of tokens [B, n] as flags of positions, bool [B, 1, 1, longest]; those after the mask are not seen."""
    flags = mask.new_zeros((mask.shape[0], 1, 1, longest), dtype=torch.bool)
    flags[:, 0, 0, : mask.shape[1]] = mask != 0
    return flags


def fits(decoder: Any) -> bool:
    """Whether :class:`DecodeModel` covers this decoder, its blocks fused: as :func:`is_known`, and sizes and dtypes."""
    if not is_known(decoder):
        return False
    weights = (decoder.embed_tokens.weight, decoder.norm.weight)
    return all(weight.dtype in HALF and weight.shape[-1] % 8 == 0 for weight in weights)


def is_known(decoder: Any) -> bool:
    """Whether it is clear what this decoder's step does: class, embeddings, rotation and norm, all on one device."""
    kind = type(decoder)
    if not kind.__module__.startswith(FAMILIES.get(kind.__name__, " ")):
        return False
    embeddings, rotary, norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
    if type(embeddings) is not nn.Embedding or embeddings.max_norm is not None:
        return False
    if getattr(rotary, "rope_type", "") not in _FIXED_ANGLES or not type(norm).__name__.endswith("RMSNorm"):
        return False
    if len(decoder.layers) != decoder.config.num_hidden_layers or len({w.device for w in decoder.parameters()}) > 1:
        return False
    return bool(rotary.inv_freq.dim() == 1)
