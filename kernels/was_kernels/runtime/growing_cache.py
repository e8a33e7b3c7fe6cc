"""A dynamic cache with room at its end: a fused step writes its token in place, as it does into a static cache.

transformers' dynamic layers make new tensors of all keys and values for each token. A layer with room keeps them in
larger ones; whoever reads its keys and values sees those of the tokens so far, and whoever replaces them gets an
ordinary layer back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 256
"""Positions that are added at least; half of those there are, if that is more."""


@dataclass(eq=False)
class Room:
    """Keys and values of one layer, and how many positions are filled; the fields that a static layer has too.

    Attributes:
        keys: [B, heads, longest, head size].
        values: shaped like keys.
        cumulative_length: int64 scalar on their device: positions filled.
        length: the same number on the host.
    """

    keys: Tensor
    values: Tensor
    cumulative_length: Tensor
    length: int
    is_initialized = True

    @property
    def full(self) -> bool:
        return self.length >= self.keys.shape[2]


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A :class:`DynamicLayer` with a :class:`Room`, until its keys or values are replaced."""

    _room: Room | None = None

    @property
    def room(self) -> Room | None:
        """The room, or None once it was left."""
        return self._room

    @property
    def keys(self) -> Any:
        """Those of the positions filled, [B, heads, length, head size]; a view while there is room."""
        room = self._room
        return self.__dict__.get("keys") if room is None else room.keys[:, :, : room.length]

    @keys.setter
    def keys(self, value: Any) -> None:
        self._leave()
        self.__dict__["keys"] = value

    @property
    def values(self) -> Any:
        """As :attr:`keys`."""
        room = self._room
        return self.__dict__.get("values") if room is None else room.values[:, :, : room.length]

    @values.setter
    def values(self, value: Any) -> None:
        self._leave()
        self.__dict__["values"] = value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """As the class above; in place where the room has enough positions left."""
        room, more = self._room, key_states.shape[-2]
        if room is None or room.length + more > room.keys.shape[2] or key_states.shape[0] != room.keys.shape[0]:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **given)
            return found
        new = slice(room.length, room.length + more)
        with torch.no_grad():
            room.keys[:, :, new].copy_(key_states)
            room.values[:, :, new].copy_(value_states)
            room.cumulative_length.add_(more)
        room.length += more
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions filled."""
        room = self._room
        return super().get_seq_length() if room is None else room.length

    def make_room(self) -> None:
        """Copy keys and values to the beginning of larger tensors, unless the room has a position left."""
        if self._room is not None and not self._room.full:
            return
        keys, values = self.keys, self.values
        length = int(keys.shape[2])
        longest = _rounded(length + max(LEAST_ROOM, length // 2))
        with torch.inference_mode(False), torch.no_grad():
            room = Room(_larger(keys, longest), _larger(values, longest), _number(length, keys.device), length)
        self.__dict__["keys"] = self.__dict__["values"] = None
        self._room = room

    def _leave(self) -> None:
        if self._room is not None:
            keys, values = self.keys, self.values
            self._room = None
            self.__dict__.update(keys=keys, values=values)


def make_room(cache: Any) -> bool:
    """Give every layer of a dynamic cache room for one more position at least; whether it could be.

    Only where all layers are ordinary dynamic ones that hold something, and nothing is offloaded.
    """
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return False
    if not all(type(layer) in (DynamicLayer, GrowingLayer) and layer.is_initialized for layer in layers):
        return False
    for layer in layers:
        if type(layer) is DynamicLayer:
            keys = layer.keys
            if keys is None or keys.dim() != 4 or not keys.numel():
                return False
            layer.__class__ = GrowingLayer
        layer.make_room()
    return True


def filled(layer: Any) -> Any:
    """What a kernel reads and writes of a cache's layer: a static layer itself, or a room with a position left."""
    if isinstance(layer, GrowingLayer):
        return None if layer.room is None or layer.room.full else layer.room
    return layer if type(layer).__name__ == "StaticLayer" else None


def _larger(tensor: Tensor, longest: int) -> Tensor:
    rows, heads, length, size = tensor.shape
    larger = tensor.new_zeros((rows, heads, longest, size))
    larger[:, :, :length] = tensor
    return larger


def _number(length: int, device: torch.device) -> Tensor:
    return torch.full((), length, dtype=torch.int64, device=device)


def _rounded(length: int) -> int:
    return -(-length // 64) * 64
