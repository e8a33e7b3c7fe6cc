"""Which tokens of a forward lie in the dense prefix of their sequence, known on the device without a sync."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from was_search.errors import ModelError

CACHES = ("cache", "past_key_values")
"""What the decoder calls its cache: the name since transformers 5.24, and the one before."""


class DensePrefix:
    """Flags the tokens at positions under ``prefix``; hooks on the decoder keep the flags up to date.

    A token's position in its sequence comes from the first of the following that the decoder is called with:

    1. ``position_ids`` (``generate`` always passes them and counts from the first real token, so left padding
       is right; packed sequences restart at 0);
    2. a 2-D ``attention_mask``: the count of real tokens before it;
    3. ``cache_position``;
    4. the length of the ``cache`` (``past_key_values`` before transformers 5.24) plus the place in the input.

    So a left-padded batch needs 1 or 2; with neither, padding counts as tokens. Padding itself is flagged
    dense, which changes nothing that is read. The flags hold during the decoder's forward only: a block
    called by itself has no dense prefix.
    """

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self._flags: Tensor | None = None
        self._names: tuple[str, ...] = ()

    def attach(self, decoder: nn.Module) -> list[RemovableHandle]:
        """Follow ``decoder``, the module that holds the list of blocks; returns the hooks to remove."""
        self._names = tuple(inspect.signature(decoder.forward).parameters)
        return [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, always_call=True),
        ]

    def dense(self, x: Tensor) -> Tensor | None:
        """Flags of the rows of x [..., d], row-major: bool [x.numel() / d]; None outside a forward.

        Raises:
            ModelError: x does not hold one row per token of the running forward.
        """
        flags = self._flags
        if flags is None:
            return None
        if flags.numel() * x.shape[-1] != x.numel():
            raise ModelError(
                f"a projection got input {list(x.shape)} where the model runs {flags.numel()} tokens; models "
                "whose projections see other rows than their tokens need a plan with dense_prefix 0"
            )
        return flags if flags.device == x.device else flags.to(x.device)

    def begin(self, given: dict[str, Any]) -> None:
        """Flag the tokens of a forward of the decoder that is called with ``given``, until :meth:`end`."""
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ModelError("the decoder was called with neither input_ids nor inputs_embeds")
        batch, length = tokens.shape[:2]
        positions = token_positions(given, length, tokens.device)
        self._flags = (positions < self.prefix).expand(batch, length).reshape(-1).contiguous()

    def end(self) -> None:
        self._flags = None

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin(dict(zip(self._names, args, strict=False)) | kwargs)

    def _after(self, *_: Any) -> None:
        self.end()


def token_positions(given: dict[str, Any], length: int, device: torch.device) -> Tensor:
    """Positions of the ``length`` tokens of a forward called with ``given``, int64 [batch or 1, length]."""
    position_ids = given.get("position_ids")
    if position_ids is not None:
        while position_ids.dim() > 2:  # one plane per rotary axis; the first is time
            position_ids = position_ids[0]
        return _two_dimensional(position_ids)
    places = torch.arange(length, device=device)
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if cache is not None:
        places = places + cache.get_seq_length()  # a tensor for a static cache: never read on the host
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1)[:, places.clamp(max=mask.shape[1] - 1)]
    cache_position = given.get("cache_position")
    return _two_dimensional(places if cache_position is None else cache_position)


def _two_dimensional(positions: Tensor) -> Tensor:
    return positions if positions.dim() == 2 else positions.reshape(1, -1)
