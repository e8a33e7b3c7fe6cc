"""One-token steps of a decoder on a CPU by one call of compiled code, or few of torch: small models wait for calls.

As :mod:`was_kernels.runtime.decode_block` and :mod:`was_kernels.runtime.decode_model` do for CUDA, blocks of known
classes take such steps without transformers' modules between their projections; everything else is left to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from was_kernels.ops.reference import rms_norm
from was_kernels.runtime import decode_block, decode_model
from was_kernels.runtime.compiled_decoder import CompiledDecoder
from was_kernels.runtime.decode_model import DecodeModel, cache_of, mask_of
from was_kernels.runtime.fused_forward import hooks_of, is_hooked
from was_kernels.runtime.growing_cache import Room, filled, make_room
from was_kernels.runtime.masked_group import MaskedGroup
from was_kernels.runtime.positions import DensePrefix
from was_kernels.runtime.sparse_linear import SparseLinear

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Token:
    """What all blocks share in a step: cosines and sines [B or 1, 1, head size], signs included."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    dense: Tensor | None
    skip: bool


class CpuBlock:
    """The one-token step of a block.

    Args:
        layer: of a class in :data:`was_kernels.runtime.decode_block.FAMILIES`, that :func:`fits`.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._qkv = MaskedGroup([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = MaskedGroup([attention.o_proj])
        self._gate_up = MaskedGroup([mlp.gate_proj, mlp.up_proj])
        self._down = MaskedGroup([mlp.down_proj])
        self._head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self._scaling: float = attention.scaling
        self._size: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._size
        self._key_heads = attention.k_proj.out_features // self._size

    @property
    def groups(self) -> tuple[MaskedGroup, MaskedGroup, MaskedGroup, MaskedGroup]:
        """The maps of each input: q, k and v; out; gate and up; down."""
        return self._qkv, self._out, self._gate_up, self._down

    def forget(self) -> None:
        """Find masks' cutoffs anew: norms were written over."""
        for group in self.groups:
            group.forget()

    def step(self, x: Tensor, token: _Token, cache: Any) -> Tensor:
        """The block's output for x [B, d]; ``cache``, its layer, is one position longer afterwards."""
        dense, skip = token.dense, token.skip
        qkv = self._qkv(_norm(x, self._norms[0]), dense, skip=skip)
        (projected,) = self._out(self._attend(qkv, token, cache), dense, skip=skip)
        x = x + projected
        gate, up = self._gate_up(_norm(x, self._norms[1]), dense, skip=skip)
        (down,) = self._down(F.silu(gate).mul_(up), dense, skip=skip)
        return x + down

    def _attend(self, qkv: list[Tensor], token: _Token, cache: Any) -> Tensor:
        rows, size, heads = qkv[0].shape[0], self._size, self._heads
        q, k, v = (part.view(rows, -1, size) for part in qkv)
        q_norm, k_norm = self._head_norms
        if q_norm is not None and k_norm is not None:
            q = rms_norm(q, q_norm.weight, q_norm.variance_epsilon)
            k = rms_norm(k, k_norm.weight, k_norm.variance_epsilon)
        turned = _rotated(torch.cat((q, k), 1), token.cos, token.sin)
        at = cache.length if isinstance(cache, Room) else int(cache.cumulative_length)
        cache.keys.select(2, at).copy_(turned[:, heads:])
        cache.values.select(2, at).copy_(v)
        cache.cumulative_length.add_(1)
        if isinstance(cache, Room):
            cache.length += 1
        mask = token.mask
        # The queries of one key head are as queries of one row each: no key is repeated.
        attended = F.scaled_dot_product_attention(
            turned[:, :heads].reshape(rows, self._key_heads, -1, size),
            cache.keys[:, :, : at + 1],
            cache.values[:, :, : at + 1],
            attn_mask=None if mask is None else mask[..., : at + 1],
            scale=self._scaling,
        )
        return attended.reshape(rows, -1)


class CpuModel(DecodeModel):
    """Takes the one-token steps of a decoder on a CPU.

    Args:
        decoder: that :func:`fits`.
        prefix: tells which tokens are dense. It is kept up to date here: attach no hooks for it.
        dense_above: steps of more rows keep every channel; None: none do.
    """

    def __init__(self, decoder: Any, prefix: DensePrefix | None, dense_above: int | None) -> None:
        super().__init__(decoder, [], prefix)
        self._blocks = [CpuBlock(layer) for layer in decoder.layers]
        self._projections = [module for module in decoder.modules() if isinstance(module, SparseLinear)]
        self._modules = tuple(module for module in decoder.modules() if module is not decoder)
        self._hooks = hooks_of(self._modules)
        self._values = tuple(vars(module) for module in self._modules)
        self._dense_above = dense_above
        self.compiled = CompiledDecoder.of(decoder, [block.groups for block in self._blocks])
        self._scales = [projection.norms for projection in self._projections]
        self._written = 0
        self._dtype: torch.dtype = decoder.embed_tokens.weight.dtype

    @property
    def counts(self) -> bool:
        return any(projection.count is not None for projection in self._projections)

    def prepared(self, given: dict[str, Any]) -> dict[str, Any] | None:
        if torch.compiler.is_compiling() or not self.is_step(given):
            return None
        layers = self._layers(cache_of(given), given["input_ids"].shape[0])
        mask = mask_of(given)
        if not layers or not self._alone() or not _covers(mask, int(layers[0].cumulative_length) + 1):
            return None
        seen = _seen(mask)
        if seen is not None and given.get("position_ids") is None:
            return None  # where padding is, tokens of the dense prefix are told by the mask
        return {**given, "attention_mask": seen}

    @torch.no_grad()
    def run(self, given: dict[str, Any]) -> Any:
        decoder, tokens, caches = self._decoder, given["input_ids"], cache_of(given)
        self._look_at_norms()
        layers = [filled(layer) for layer in next(iter(caches.values())).layers]
        positions = given.get("position_ids")
        positions = layers[0].cumulative_length if positions is None else positions
        token = self._token(positions.reshape(-1), mask_of(given), tokens.shape[0])
        x = F.embedding(tokens[:, 0], decoder.embed_tokens.weight)
        compiled = self.compiled
        if compiled is not None and compiled.takes(layers, tokens.shape[0]):
            dense = token.dense if token.skip else x.new_ones(x.shape[0], dtype=torch.bool)
            y = compiled.run(x, (token.cos[:, 0], token.sin[:, 0]), layers, mask=token.mask, dense=dense)
            return BaseModelOutputWithPast(last_hidden_state=y[:, None], **caches)
        for block, layer in zip(self._blocks, layers, strict=True):
            x = block.step(x, token, layer)
        return BaseModelOutputWithPast(last_hidden_state=_norm(x, decoder.norm)[:, None], **caches)

    def _look_at_norms(self) -> None:
        written = sum(norms._version for norms in self._scales)
        if written != self._written:
            for block in self._blocks:
                block.forget()
            if self.compiled is not None:
                self.compiled.forget()
            self._written = written

    def _alone(self) -> bool:
        """Whether no module has other code on its forward, no channel is counted and no autocast is on."""
        if (any(self._hooks) or any("forward" in values for values in self._values)) and is_hooked(self._modules):
            return False
        return not self.counts and not torch.is_autocast_enabled("cpu")

    def _layers(self, caches: dict[str, Any], rows: int) -> list[Any]:
        """The layers of the cache, with a position left in each; none where they are of another kind."""
        cache = next(iter(caches.values()), None)
        layers = getattr(cache, "layers", None)
        if not layers or len(layers) != len(self._blocks) or getattr(cache, "offloading", False):
            return []
        if isinstance(layers[0], DynamicLayer) and not make_room(cache):
            return []
        held = [filled(layer) for layer in layers]
        return held if all(self._is_open(layer, rows) for layer in held) else []

    def _is_open(self, layer: Any, rows: int) -> bool:
        if layer is None or not layer.is_initialized:
            return False
        keys = layer.keys
        if keys.shape[0] != rows or keys.dtype != self._dtype or keys.device != _CPU:
            return False
        length: int = layer.length if isinstance(layer, Room) else int(layer.cumulative_length)
        longest: int = keys.shape[2]
        return length < longest

    def _token(self, positions: Tensor, mask: Tensor | None, rows: int) -> _Token:
        angles = positions[:, None, None].float() * self._frequencies
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        cos, sin = torch.cat((cos, cos), -1).to(self._dtype), torch.cat((-sin, sin), -1).to(self._dtype)
        skip = self._dense_above is None or rows <= self._dense_above
        return _Token(cos, sin, mask, self._dense(positions, rows), skip)

    def _dense(self, positions: Tensor, rows: int) -> Tensor | None:
        if self._prefix is None or min(positions.tolist()) >= self._prefix.prefix:
            return None
        return (positions < self._prefix.prefix).expand(rows)


def _norm(x: Tensor, norm: Any) -> Tensor:
    """Llama's RMSNorm of x [B, d]; that of a single row in three calls."""
    epsilon: float = norm.variance_epsilon
    if x.shape[0] > 1 or epsilon <= 0.0:
        return rms_norm(x, norm.weight, epsilon)
    length = float(torch.linalg.vector_norm(x, dtype=torch.float32))
    scale: float = (length * length / x.shape[1] + epsilon) ** -0.5
    return (x * scale).mul_(norm.weight)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, size] turned by cosines and sines [B or 1, 1, size], the sines of the first half negative."""
    rows, heads, size = x.shape
    other = x.view(rows, heads, 2, size // 2).flip(2).view(rows, heads, size)
    return torch.addcmul(x * cos, other, sin)


def _covers(mask: Any, length: int) -> bool:
    """Whether the mask is none, or one of at least ``length`` tokens [B, n] or positions [B or 1, 1, 1, n]."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape[-1] < length:
        return False
    return mask.dim() == 2 or (mask.dim() == 4 and tuple(mask.shape[1:3]) == (1, 1))


def _seen(mask: Tensor | None) -> Tensor | None:
    """The mask as attention takes it, [B or 1, 1, 1, n]; None where every token is seen."""
    if mask is None or mask.dim() == 4:
        return mask
    seen = mask != 0
    return None if bool(seen.all()) else seen[:, None, None]


def fits(decoder: Any) -> bool:
    """Whether :class:`CpuModel` covers this decoder, its projections swapped: classes, activation, sizes and dtype."""
    if not decode_model.is_known(decoder) or not all(decode_block.is_known(layer) for layer in decoder.layers):
        return False
    if {weight.dtype for weight in decoder.parameters()} != {decoder.embed_tokens.weight.dtype}:
        return False
    size = 2 * len(decoder.rotary_emb.inv_freq)
    return all(layer.self_attn.head_dim == size and _all_bags(layer) for layer in decoder.layers)


def _all_bags(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    held = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return all(
        isinstance(projection, SparseLinear) and projection.bags is not None
        for projection in (*held, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
