"""Whole one-token steps of a decoder on a CPU by one call of compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.compiled_step import MOST_ROWS, CompiledStep, Norm, StepBlock, StepCaches, StepModel
from was_kernels.runtime.compiled_code import compiled_step
from was_kernels.runtime.growing_cache import Room
from was_kernels.runtime.masked_group import MaskedGroup
from was_kernels.runtime.sparse_linear import SparseLinear

Groups = tuple[MaskedGroup, MaskedGroup, MaskedGroup, MaskedGroup]


class CompiledDecoder:
    """The compiled step of a decoder whose projections are swapped.

    Args:
        decoder: that :func:`was_kernels.runtime.cpu_step.fits`, with blocks of one size.
        groups: of each block, the maps of q, k and v, out, gate and up, and down.
        step: the compiled code for its dtype.
    """

    def __init__(self, decoder: Any, groups: Sequence[Groups], step: CompiledStep) -> None:
        self._decoder = decoder
        self._groups = groups
        self._step = step
        attention = decoder.layers[0].self_attn
        self._head_size: int = attention.head_dim
        self._scaling: float = attention.scaling
        norms = [*(norm for layer in decoder.layers for norm in _norms(layer)), decoder.norm]
        self._live = [(norm._parameters, "weight") for norm in norms]
        swapped = [module for module in decoder.modules() if isinstance(module, SparseLinear)]
        self._live += [(each._parameters, "bias") for each in swapped if each.bias is not None]
        self._built: tuple[list[int], StepModel] | None = None
        self._caches: tuple[list[int], StepCaches] | None = None

    @staticmethod
    def of(decoder: Any, groups: Sequence[Groups]) -> CompiledDecoder | None:
        """That of a decoder; None where nothing can be compiled, or its blocks or heads do not fit."""
        step, blocks = compiled_step(decoder.embed_tokens.weight.dtype), {_sizes(layer) for layer in decoder.layers}
        if step is None or len(blocks) != 1 or decoder.layers[0].self_attn.head_dim % step.lanes:
            return None
        return CompiledDecoder(decoder, groups, step)

    def takes(self, caches: Sequence[Any], rows: int) -> bool:
        """Whether a step of so many rows over these layers of a cache is one of ours."""
        first = caches[0]
        if rows > MOST_ROWS or first.keys.stride(3) != 1 or first.values.stride(3) != 1:
            return False
        if isinstance(first, Room):
            return all(isinstance(layer, Room) and layer.length == first.length for layer in caches)
        length = first.cumulative_length
        return all(not isinstance(layer, Room) and torch.equal(layer.cumulative_length, length) for layer in caches)

    def forget(self) -> None:
        """Make the structures anew: norms of scores were written over."""
        self._built = None

    def run(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        caches: Sequence[Any],
        *,
        mask: Tensor | None,
        dense: Tensor | None,
    ) -> Tensor:
        """The decoder's output [B, hidden] for embedded tokens x; each layer is one position longer afterwards."""
        first = caches[0]
        at = first.length if isinstance(first, Room) else int(first.cumulative_length)
        y = self._step.decode(self._model(), x, angles, self._held(caches), at, mask=mask, dense=dense)
        torch._foreach_add_([layer.cumulative_length for layer in caches], 1)
        for layer in caches:
            if isinstance(layer, Room):
                layer.length += 1
        return y

    def _model(self) -> StepModel:
        state = [0 if (found := held[name]) is None else found.data_ptr() for held, name in self._live]
        if self._built is None or self._built[0] != state:
            blocks = [_block(*pair) for pair in zip(self._decoder.layers, self._groups, strict=True)]
            last = _norm(self._decoder.norm)
            self._built = state, StepModel(blocks, last, head_size=self._head_size, scaling=self._scaling)
        return self._built[1]

    def _held(self, caches: Sequence[Any]) -> StepCaches:
        state = [tensor.data_ptr() for layer in caches for tensor in (layer.keys, layer.values)]
        state += caches[0].keys.stride()
        if self._caches is None or self._caches[0] != state:
            self._caches = state, StepCaches([(layer.keys, layer.values) for layer in caches])
        return self._caches[1]


def _block(layer: Any, groups: Groups) -> StepBlock:
    first, second, *of_heads = (_norm(norm) for norm in _norms(layer))
    heads = (of_heads[0], of_heads[1]) if of_heads else None
    return StepBlock((first, second), heads, *(group.kept() for group in groups))


def _sizes(layer: Any) -> tuple[int, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    held = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj
    return (attention.head_dim, *(size for each in held for size in (each.in_features, each.out_features)))


def _norms(layer: Any) -> list[Any]:
    attention = layer.self_attn
    found = [layer.input_layernorm, layer.post_attention_layernorm]
    return found if getattr(attention, "q_norm", None) is None else [*found, attention.q_norm, attention.k_norm]


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight.detach(), float(norm.variance_epsilon))
