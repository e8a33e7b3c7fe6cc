"""One-token steps of a decoder block in five launches: the projections of a plan fused with all that lies between them.

A block whose class is known gets a subclass of it that takes such steps itself and leaves everything else (prompts,
other caches, wanted attention weights) to transformers. Modules, names and parameters stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from was_kernels.ops.attend import HEAD_SIZES, AttendStep, attend, attend_in_parts
from was_kernels.ops.attention_parts import AttentionParts
from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_launch import launch_gather
from was_kernels.ops.gather_step import HALF, MAX_CHANNELS, GatherStep
from was_kernels.runtime.fused_forward import is_hooked
from was_kernels.runtime.growing_cache import Room, filled
from was_kernels.runtime.positions import DensePrefix
from was_kernels.runtime.sparse_linear import SparseLinear

FAMILIES = {
    "LlamaDecoderLayer": "transformers.models.llama.",
    "MistralDecoderLayer": "transformers.models.mistral.",
    "Qwen2DecoderLayer": "transformers.models.qwen2.",
    "Qwen3DecoderLayer": "transformers.models.qwen3.",
}
"""Classes of blocks whose forward is: norm, attention, add, norm, gated MLP, add; and where they must come from."""


class DecodeBlock:
    """What a block's one-token step needs, gathered once.

    Args:
        layer: of a class in :data:`FAMILIES`, its seven projections swapped for :class:`SparseLinear`.
        prefix: tells which tokens are dense.
        workspace: the model's, of :func:`was_kernels.ops.gather_launch.new_workspace`.
        dense_above: leave steps of more rows to the modules, which then keep every channel; None: run all.

    Attributes:
        max_rows: the most rows of a step that runs here.
    """

    def __init__(
        self, layer: Any, prefix: DensePrefix | None, workspace: Tensor, *, dense_above: int | None = None
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._projections: tuple[SparseLinear, ...] = (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        )
        self._layer = layer
        self._modules = tuple(layer.modules())
        self._prefix = prefix
        self._workspace = workspace
        self._index: int = attention.layer_idx
        self._head: int = attention.head_dim
        self._heads = attention.q_proj.out_features // attention.head_dim
        self._scaling: float = attention.scaling
        most = self._projections[0].held.columns.max_rows
        self.max_rows = most if dense_above is None else min(most, dense_above)

    @property
    def counts(self) -> bool:
        """Whether kept channels of its projections are counted."""
        return any(projection.count is not None for projection in self._projections)

    def takes(self, hidden: Tensor, given: dict[str, Any]) -> bool:
        """Whether this forward is a step that :meth:`run` covers."""
        if hidden.dim() != 3 or hidden.shape[1] != 1 or not 1 <= hidden.shape[0] <= self.max_rows:
            return False
        if hidden.dtype != self._projections[0].dtype or given.get("output_attentions"):
            return False
        if self.counts:
            return False
        layer, angles, mask = self._cache_layer(given), given.get("position_embeddings"), given.get("attention_mask")
        if layer is None or angles is None or layer.keys.dtype != hidden.dtype:
            return False
        if layer.keys.device != hidden.device or self._workspace.device != hidden.device or is_hooked(self._modules):
            return False
        if layer.keys.shape[0] != hidden.shape[0]:
            return False
        if any(angle.shape[-1] != self._head or angle.dtype != hidden.dtype for angle in angles):
            return False
        return mask is None or _is_row_of_flags(mask, layer.keys.shape[2])

    def forward(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """The block's forward: a step through :meth:`run`, all else through ``plain``, the class's own forward."""
        hidden = args[0] if args else given.get("hidden_states")
        others = {name: value for name, value in given.items() if name != "hidden_states"}
        if len(args) <= 1 and hidden is not None and self.takes(hidden, others):
            return self.run(hidden, others)
        return plain(self._layer, *args, **given)

    def run(self, hidden: Tensor, given: dict[str, Any]) -> Tensor:
        """The block's output for hidden states [B, 1, d]; the cache's layer is one position longer afterwards."""
        x = hidden.reshape(hidden.shape[0], -1).contiguous()
        dense = None if self._prefix is None else self._prefix.dense(x)
        return self.step(x, given, dense)[0].view(hidden.shape)

    def step(
        self, x: Tensor, given: dict[str, Any], dense: Tensor | None, squares: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`run` for x [B, d] and flags of dense rows [B], with the sums of x's squares and of the output's.

        The sums, float32 [B, n], spare the RMSNorm a reading of all of x; without them it does that.
        """
        layer, attention = self._layer, self._layer.self_attn
        direct = x.is_cuda and not torch.compiler.is_compiling()
        qkv, _ = self._gather(x, (0, 1, 2), layer.input_layernorm, dense, squares=squares)
        cache, (cos, sin), mask = self._cache_layer(given), given["position_embeddings"], given.get("attention_mask")
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        inputs = AttendStep(
            qkv,
            cache.keys,
            cache.values,
            cache.cumulative_length,
            cos.reshape(-1, self._head),
            sin.reshape(-1, self._head),
            self._heads,
            self._scaling,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            epsilon=0.0 if q_norm is None else q_norm.variance_epsilon,
            mask=None if mask is None else mask[:, 0, 0],
        )
        attended = attend_in_parts(inputs, early=True) if direct else attend(inputs, self._workspace, early=True)
        if isinstance(cache, Room):
            cache.length += 1
        x, squares = self._gather(attended, (3,), None, dense, residual=x)
        inner, _ = self._gather(x, (4, 5), layer.post_attention_layernorm, dense, gated=True, squares=squares)
        return self._gather(inner, (6,), None, dense, residual=x)

    def _gather(
        self,
        x: Tensor | AttentionParts,
        which: tuple[int, ...],
        norm: Any,
        dense: Tensor | None,
        *,
        gated: bool = False,
        residual: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        step = GatherStep(
            x,
            [self._projections[p].sparse for p in which],
            gated,
            None if norm is None else norm.weight,
            0.0 if norm is None else norm.variance_epsilon,
            residual,
            dense,
        )
        if isinstance(x, AttentionParts) or (x.is_cuda and not torch.compiler.is_compiling()):
            return launch_gather(step, self._workspace, squares=squares, want_squares=residual is not None, early=True)
        return gather_gemv(step, self._workspace, early=True), None

    def _cache_layer(self, given: dict[str, Any]) -> Any:
        """What :func:`filled` says of this block's layer of the cache, if that holds something; else None."""
        cache = given.get("cache")
        cache = given.get("past_key_values") if cache is None else cache
        layers = getattr(cache, "layers", None)
        if layers is None or self._index >= len(layers) or getattr(cache, "offloading", False):
            return None
        held = filled(layers[self._index])
        return held if held is not None and held.is_initialized else None


def _is_row_of_flags(mask: Any, longest: int) -> bool:
    """Whether ``mask`` has a flag for each position of the cache, seen or not: bool [B or 1, 1, 1, n]."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.bool:
        return False
    return mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] >= longest and mask.stride(3) == 1


def is_known(layer: Any) -> bool:
    """Whether it is clear what this block's step does: class and activation."""
    kind = type(layer)
    if not kind.__module__.startswith(FAMILIES.get(kind.__name__, " ")):
        return False
    return type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def fits(layer: Any) -> bool:
    """Whether :class:`DecodeBlock` covers this block, its projections swapped: :func:`is_known`, sizes and dtype."""
    if not is_known(layer):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    down, q, k = mlp.down_proj, attention.q_proj, attention.k_proj
    if attention.head_dim not in HEAD_SIZES:
        return False
    # Queries of one key head are kept in registers.
    if q.out_features // k.out_features * attention.head_dim > 1024:
        return False
    widths = (q.out_features, k.out_features, down.in_features, down.out_features)
    each = down.held.columns.multiple
    sizes_fit = all(width % each == 0 and width <= MAX_CHANNELS for width in widths)
    return sizes_fit and down.dtype in HALF and down.dtype == layer.input_layernorm.weight.dtype
