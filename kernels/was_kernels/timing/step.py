"""Time one decoding step of a whole model over a static cache, and count what it reads."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from was_kernels.ops.reference import kept_channels
from was_kernels.runtime.sparse_model import SparseModel
from was_search.checkpoints.quantised import QuantisedLinear
from was_search.shape import FloatArray

_COUNTED_STEPS = 8
_WARM_UP = 5
_READS = 8
_READ_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Times:
    """Percentiles of a step's time in milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Counted:
    """What decoding steps keep of the projections.

    Attributes:
        sparsity: parameter-weighted share of channels dropped by a row.
        live_channels: channels of all projections that any row of a step keeps.
        channels: all channels.
        weight_bytes: bytes of the live channels' weights.
        sparsities: share of channels dropped by a row, by projection, float64 [L, 7].
    """

    sparsity: float
    live_channels: float
    channels: int
    weight_bytes: int
    sparsities: FloatArray


class DecodeStep:
    """One token a row through a model whose static cache holds about ``kv_length`` positions.

    On a GPU the step is replayed from a CUDA graph, on CPU it is called. Every step gets other tokens.

    Args:
        model: a transformers causal LM, dense or running a plan.
        tokens: int64 [batch, at least kv_length + 1]: the first ``kv_length`` are the prompt, the others the steps'
            input, over and over.
        kv_length: positions in the cache in the middle of a timing; at least 32.
        compiled: call the model through ``torch.compile``.
    """

    def __init__(self, model: Any, tokens: Tensor, kv_length: int, *, compiled: bool = False) -> None:
        from transformers import StaticCache

        if kv_length < 32 or tokens.shape[1] <= kv_length:
            raise ValueError(f"kv_length: at least 32 and under the {tokens.shape[1]} tokens needed, got {kv_length}")
        self._model = model
        self._device = tokens.device
        self._kv_length = kv_length
        self._steps = tokens[:, kv_length:]
        self._token = tokens[:, kv_length : kv_length + 1].clone()
        self._cache = StaticCache(config=model.config, max_cache_len=2 * kv_length)
        names = inspect.signature(model.forward).parameters
        self._given = {"cache" if "cache" in names else "past_key_values": self._cache, "use_cache": True}
        self._graph: Callable[[], Any] | None = None
        self._forward: Callable[..., Any] = model.forward
        with torch.inference_mode():
            model(tokens[:, : kv_length - 1], **self._given)
        if compiled:
            self._forward = torch.compile(model.forward, fullgraph=True)

    def run(self) -> Tensor:
        """Logits [batch, 1, vocabulary] of one eager step; the cache is one position longer afterwards."""
        logits: Tensor = self._forward(self._token, **self._given).logits
        return logits

    @torch.inference_mode()
    def times(self, steps: int = 50, *, again: bool = False) -> Times:
        """Percentiles over ``steps`` steps, after a few more that are not counted.

        With ``again`` the graph that an earlier call captured is replayed: for a model of which nothing but the
        contents of tensors has changed.
        """
        steps = min(steps, self._kv_length)
        self._rewind(self._kv_length - 16)
        call = self._graph if again else None
        if call is None:
            call = self._graph = self._captured() if self._device.type == "cuda" else self.run
        self._rewind(self._kv_length - (steps + _WARM_UP) // 2)
        return self._timed(call, steps)

    @torch.inference_mode()
    def counted(self, handle: SparseModel) -> Counted:
        """Channels kept in a few steps of a model that runs a plan."""
        self._rewind(self._kv_length - _COUNTED_STEPS)
        live = torch.zeros((), dtype=torch.int64, device=self._device)
        read = torch.zeros_like(live)

        def count(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, module.in_features)
            kept = kept_channels(x, module.norms, module.step_threshold(len(x))).any(dim=0).sum()
            live.add_(kept)
            read.add_(kept * module.channel_bytes)

        projections = handle.projections
        hooks = [projection.register_forward_pre_hook(count) for projection in projections]
        try:
            with handle.counting() as counts:
                for step in range(_COUNTED_STEPS):
                    self._next(step)
                    self.run()
        finally:
            for hook in hooks:
                hook.remove()
        channels = sum(projection.in_features for projection in projections)
        read_bytes = int(read) // _COUNTED_STEPS
        return Counted(counts.sparsity(), int(live) / _COUNTED_STEPS, channels, read_bytes, counts.achieved())

    def _captured(self) -> Callable[[], Any]:
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph.replay

    def _timed(self, call: Callable[[], Any], steps: int) -> Times:
        on_gpu = self._device.type == "cuda"
        event: Any = torch.cuda.Event
        marks: list[tuple[Any, Any]] = []
        for step in range(steps + _WARM_UP):
            self._next(step)
            if on_gpu:
                events = (event(enable_timing=True), event(enable_timing=True))
                events[0].record()
                call()
                events[1].record()
                marks.append(events)
            else:
                started = time.perf_counter()
                call()
                marks.append((started, time.perf_counter()))
        if on_gpu:
            torch.cuda.synchronize(self._device)
        found = [start.elapsed_time(end) if on_gpu else 1e3 * (end - start) for start, end in marks[_WARM_UP:]]
        return Times(*torch.tensor(found).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist())

    def _next(self, step: int) -> None:
        at = step % self._steps.shape[1]
        self._token.copy_(self._steps[:, at : at + 1])

    def _rewind(self, to: int) -> None:
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(to)
            if hasattr(layer, "cumulative_length_int"):  # a sliding window counts on the host too
                layer.cumulative_length_int = to


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a plain sum reads at: what reading alone reaches on this device."""
    data = torch.ones(_READ_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    fastest = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(_READS - 1):
            data.sum()
        float(data.sum())  # waits for all sums
        fastest = min(fastest, (time.perf_counter() - started) / _READS)
    return data.numel() * 4 / fastest


def head_bytes(model: Any) -> int:
    """Bytes of the weight that makes the logits."""
    weight = model.get_output_embeddings().weight
    return int(weight.numel() * weight.element_size())


def cache_bytes(model: Any, batch: int, kv_length: int) -> int:
    """Bytes of keys and values of ``kv_length`` positions of ``batch`` rows, in the weights' dtype."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * batch * config.num_hidden_layers * config.num_key_value_heads * head * kv_length
    return int(cached * model.get_output_embeddings().weight.element_size())


def other_bytes(model: Any, batch: int, kv_length: int) -> int:
    """What a step reads besides the projections: the head, and the cache of ``kv_length`` positions."""
    return head_bytes(model) + cache_bytes(model, batch, kv_length)


def projection_bytes(linears: list[nn.Module]) -> int:
    """Bytes of the weights of ``linears``, with the scales of rounded ones."""
    total = 0
    for linear in linears:
        rounded = isinstance(linear, QuantisedLinear)
        held: list[Any] = [linear.packed, linear.scales] if rounded else [linear.weight]
        total += sum(tensor.numel() * tensor.element_size() for tensor in held)
    return total
