"""One-token steps of a whole causal language model, replayed from CUDA graphs that are captured on the way.

A step of a 7B model is some two hundred launches, and Python between them takes many times what the GPU does. A graph
launches them at once. It is kept for one cache, number of rows and kind of mask; what it would get wrong runs without.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from was_kernels.runtime.capture import CaptureError, addresses, captured
from was_kernels.runtime.decode_model import DecodeModel, cache_of, longest_of, mask_of, row_of_flags
from was_kernels.runtime.fused_forward import hooks_of, is_hooked
from was_kernels.runtime.growing_cache import Room, filled
from was_kernels.runtime.positions import CACHES

_LOG = logging.getLogger(__name__)

MOST_GRAPHS = 4
"""Graphs kept; the one that was used longest ago goes first."""

_OF_A_STEP = frozenset(
    (
        *("input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep"),
        *(*CACHES, "cache_position", "next_sequence_length", "inputs_embeds", "is_first_iteration"),
    )
)
"""What ``generate`` hands on for a step; with anything else the step is left to transformers."""


@dataclass
class _Graph:
    """A captured step: what is copied into its inputs before a replay, and what it leaves; never its cache."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    positions: Tensor | None
    flags: Tensor | None
    logits: Tensor
    output: type[Any]
    held: list[Any]
    pointers: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class _Kind:
    """What a graph is of, besides its cache."""

    rows: int
    positions: tuple[int, ...] | None
    masked: bool
    longest: int
    logits_to_keep: int | None


@dataclass
class StepGraphs:
    """Takes the one-token steps of a causal LM whose decoder is fused; a fused forward of the whole model.

    Not thread-safe, like the model. Graphs are dropped with their cache, when a weight was replaced, and by
    :meth:`drop`.

    Attributes:
        model: the causal LM.
        decode: the step of its decoder.
        refusal: why the last one-token step ran without a graph, None if it did not.
    """

    model: Any
    decode: DecodeModel
    refusal: str | None = None
    _kept: dict[tuple[int, _Kind], _Graph] = field(default_factory=dict)
    _warm: set[_Kind] = field(default_factory=set)
    _weights: tuple[int, ...] | None = None
    _looked: bool = False
    _failed: str | None = None

    methods = ("prepare_inputs_for_generation", "_valid_auto_compile_criteria")

    def __post_init__(self) -> None:
        self._modules = tuple(module for module in self.model.modules() if module is not self.model)
        self._hooks = hooks_of(self._modules)
        self._values = tuple(vars(module) for module in self._modules)
        self._pool: Any = None
        self._caches: dict[int, weakref.ref[Any]] = {}
        self._capturing = False

    def __len__(self) -> int:
        return len(self._kept)

    def drop(self) -> None:
        """Forget all graphs."""
        self._kept.clear()
        self._caches.clear()
        self._warm.clear()

    def forward(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """The model's forward: a step from a graph where there may be one, all else through ``plain``."""
        if self._capturing or torch.compiler.is_compiling():
            return plain(self.model, *args, **given)
        if len(args) == 1 and "input_ids" not in given:
            given, args = {"input_ids": args[0], **given}, ()
        if args or not _one_token(given):
            self._looked = False
            return plain(self.model, *args, **given)
        self.refusal = self._why_not(given)
        if self.refusal is None:
            return self._step(plain, given)
        return plain(self.model, **given)

    def prepare_inputs_for_generation(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """Of a step of ours: the inputs as they are. transformers would make a mask of four dimensions each time."""
        values = {**dict(zip(("input_ids", "next_sequence_length"), args, strict=False)), **given}
        cache, mask = _cache_of(values), values.get("attention_mask")
        if len(args) > 2 or values.get("next_sequence_length") != 1 or not self._ours(values, cache):
            return plain(self.model, *args, **given)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return plain(self.model, *args, **given)
        inputs = {name: values[name] for name in (*CACHES, "attention_mask") if values.get(name) is not None}
        positions = values.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = positions[..., -1:]
        if values.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = values["logits_to_keep"]
        return {**inputs, "input_ids": values["input_ids"][:, -1:], "use_cache": True}

    def _valid_auto_compile_criteria(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """``generate`` need not compile what runs from a graph; a compile configuration of the user's is obeyed."""
        values = {**dict(zip(("model_kwargs", "generation_config"), args, strict=False)), **given}
        wanted = getattr(values.get("generation_config"), "compile_config", None) is not None
        if not wanted and self._failed is None and not self._hooked():
            return False
        return plain(self.model, *args, **given)

    def _ours(self, given: dict[str, Any], cache: Any) -> bool:
        """Whether a step with these inputs may run from a graph, by what is known before it."""
        if any(value is not None and value is not False for name, value in given.items() if name not in _OF_A_STEP):
            return False
        if given.get("inputs_embeds") is not None or given.get("is_first_iteration") or cache is None:
            return False
        return given.get("use_cache") is not False

    def _why_not(self, given: dict[str, Any]) -> str | None:
        tokens = given["input_ids"]
        if not tokens.is_cuda:
            return "not on a GPU"
        if self._failed is not None:
            return self._failed
        if torch.cuda.is_current_stream_capturing():
            return "the caller captures the step"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on"
        if not self._ours(given, _cache_of(given)):
            return "the step has inputs of its own"
        if given.get("logits_to_keep") not in (None, 0, 1):
            return "the step has inputs of its own"
        if self._hooked():
            return "a module has hooks, or a forward of its own"
        if self.decode.counts:
            return "channels are counted"
        return None

    def _hooked(self) -> bool:
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return True
        return (any(self._hooks) or any("forward" in values for values in self._values)) and is_hooked(self._modules)

    def _step(self, plain: Any, given: dict[str, Any]) -> Any:
        cache = _cache_of(given)
        of_the_head = ("logits_to_keep", "return_dict")
        if given.get("return_dict") is False or not self.decode.is_step(
            {name: value for name, value in given.items() if name not in of_the_head}
        ):
            self.refusal = "the step is none that runs fused"
            return plain(self.model, **given)
        longest = longest_of(cache)
        mask = mask_of(given)
        held = [] if longest is None else [filled(layer) for layer in cache.layers]
        if longest is None or any(layer is None for layer in held) or not _fits(mask, given["input_ids"], longest):
            self.refusal = "the cache or the mask is of another kind"
            return plain(self.model, **given)
        self._look_at_weights()
        positions = given.get("position_ids")
        kind = _Kind(
            given["input_ids"].shape[0],
            None if positions is None else tuple(positions.shape),
            mask is not None,
            longest,
            given.get("logits_to_keep"),
        )
        graph = self._kept.pop((id(cache), kind), None)
        if graph is None or graph.pointers != _pointers(held):
            if kind not in self._warm:  # kernels are compiled and cuBLAS makes its workspace outside of a capture
                self._warm.add(kind)
                self.refusal = "the first step of its kind"
                return plain(self.model, **given)
            graph = self._captured(plain, given, cache, mask, kind, held)
            if graph is None:
                return plain(self.model, **given)
        else:
            for room in held:
                if isinstance(room, Room):
                    room.length += 1
        self._kept[id(cache), kind] = graph  # the newest is the last
        graph.tokens.copy_(given["input_ids"])
        if graph.positions is not None and positions is not None:
            graph.positions.copy_(positions)
        if graph.flags is not None and mask is not None:
            _copy_flags(graph, mask)
        graph.graph.replay()
        return graph.output(logits=graph.logits.clone(), **cache_of(given))

    def _captured(
        self, plain: Any, given: dict[str, Any], cache: Any, mask: Tensor | None, kind: _Kind, held: list[Any]
    ) -> _Graph | None:
        """The step as a graph, not run yet; None where it cannot be captured, which then holds for all."""
        lengths = [room.length for room in held if isinstance(room, Room)]
        with torch.inference_mode(False), torch.no_grad():
            tokens = given["input_ids"].clone()
            positions = None if given.get("position_ids") is None else given["position_ids"].clone()
            flags = None if mask is None else row_of_flags(mask, kind.longest) if mask.dim() == 2 else mask.clone()
            inputs = {**given, "input_ids": tokens, "position_ids": positions, "attention_mask": flags}
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._capturing = True
            try:
                graph, output = captured(
                    lambda: plain(self.model, **{**inputs, "return_dict": True}), tokens.device, pool=self._pool
                )
            except CaptureError as error:
                for room, length in zip((r for r in held if isinstance(r, Room)), lengths, strict=True):
                    room.length = length
                self._failed = self.refusal = str(error)
                _LOG.warning("steps run without CUDA graphs: %s", self._failed)
                return None
            finally:
                self._capturing = False
        while len(self._kept) >= MOST_GRAPHS:
            self._kept.pop(next(iter(self._kept)))
        self._follow(cache)
        width = 0 if mask is None else mask.shape[-1]
        return _Graph(graph, tokens, positions, flags, output.logits, type(output), held, _pointers(held), width)

    def _follow(self, cache: Any) -> None:
        """Drop the graphs of ``cache`` when it goes: their kernels write into its memory."""
        number = id(cache)
        if number not in self._caches:

            def gone(_: Any, graphs: StepGraphs = self) -> None:
                graphs._caches.pop(number, None)
                for key in [key for key in graphs._kept if key[0] == number]:
                    del graphs._kept[key]

            self._caches[number] = weakref.ref(cache, gone)

    def _look_at_weights(self) -> None:
        """Once after each prompt: graphs read the weights where they lay."""
        if self._looked:
            return
        pointers = addresses(self.model)
        if pointers != self._weights:
            self._kept.clear()
        self._weights, self._looked = pointers, True


def _one_token(given: dict[str, Any]) -> bool:
    tokens = given.get("input_ids")
    return isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] == 1


def _cache_of(given: dict[str, Any]) -> Any:
    return next(iter(cache_of(given).values()), None)


def _fits(mask: Any, tokens: Tensor, longest: int) -> bool:
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, tokens.shape[0]):
        return False
    if mask.dim() == 2:
        return mask.shape[0] == tokens.shape[0] and mask.shape[1] <= longest
    return (
        mask.dim() == 4 and mask.dtype == torch.bool and tuple(mask.shape[1:3]) == (1, 1) and mask.shape[3] == longest
    )


def _copy_flags(graph: _Graph, mask: Tensor) -> None:
    flags, width = graph.flags, mask.shape[-1]
    assert flags is not None
    if mask.dim() == 2:
        if width < graph.width:
            flags.zero_()
        flags[:, 0, 0, :width].copy_(mask)
    else:
        flags.copy_(mask)
    graph.width = width


def _pointers(held: list[Any]) -> tuple[int, ...]:
    return tuple(
        pointer
        for layer in held
        for pointer in (layer.keys.data_ptr(), layer.values.data_ptr(), layer.cumulative_length.data_ptr())
    )


def supports(model: nn.Module) -> bool:
    """Whether ``model`` is a causal LM of transformers whose steps ``generate`` makes."""
    return (
        hasattr(model, "prepare_inputs_for_generation") and "input_ids" in inspect.signature(model.forward).parameters
    )
