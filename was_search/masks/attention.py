"""Attention in backward passes: to whole texts, and on a GPU with gradients that are added in a fixed order.

cuDNN's attention, which PyTorch prefers on some GPUs, adds up gradients in an order that changes from run to run. So do
PyTorch's own unless :func:`torch.use_deterministic_algorithms` asks for more. That switch makes other functions raise,
among them all products unless the environment has prepared cuBLAS, so that it is turned on just before attention's own
backward and off right after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_WHOLE_TEXTS = "was_whole_texts"
_MASKED = "was_masked"

_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those whose backward adds in a fixed order when it is asked to."""


def needs_no_mask(config: Any, length: int) -> bool:
    """Whether attention to texts of ``length`` tokens is plainly causal, by a function that makes that so."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    attention = config._attn_implementation
    if attention != "sdpa" and attention in ALL_MASK_ATTENTION_FUNCTIONS:
        return False
    if not {"full_attention", "sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or window >= length


def attend_whole_texts(model: Any) -> None:
    """Let ``model`` attend by sdpa without asking transformers for a mask, which whole texts need none of.

    transformers makes none for them anyway, but cannot see that they are whole while launches are recorded.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_WHOLE_TEXTS, _attend_in_order)  # a name without a mask function of its own
    model.set_attn_implementation(_WHOLE_TEXTS)


@contextmanager
def attention_in_order(model: Any, length: int) -> Iterator[None]:
    """While open, sdpa's gradients are added in a fixed order; whole texts are attended to without a mask.

    Attention other than sdpa is left as it is.

    Args:
        model: a causal LM of transformers.
        length: of every text, tokens.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    if before not in ("sdpa", _WHOLE_TEXTS):
        yield
        return
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    if needs_no_mask(model.config, length):
        attend_whole_texts(model)
    else:
        AttentionInterface.register(_MASKED, _attend_in_order)
        AttentionMaskInterface.register(_MASKED, sdpa_mask)
        model.set_attn_implementation(_MASKED)
    memory.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(_BACKENDS):
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)  # a backward that failed may have left it on
        model.set_attn_implementation(before)


def _attend_in_order(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The query's last, so that it is the first to be gone through when attention has been.
    mode = torch.get_deterministic_debug_mode()
    query = _After.apply(query, mode)  # type: ignore[no-untyped-call]
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _Before.apply(out), None  # type: ignore[no-untyped-call]


class _Before(torch.autograd.Function):
    """Its backward is the step before attention's."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.set_deterministic_debug_mode("error")
        return gradient


class _After(torch.autograd.Function):
    """Its backward is the step after attention's."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, mode: int) -> Tensor:
        ctx.mode = mode
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        torch.set_deterministic_debug_mode(ctx.mode)
        return gradient, None
