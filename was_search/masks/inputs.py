"""A function on every masked input of a model's forward: called once, however many linear maps read the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from was_search.checkpoints.structure import MaskedInput, Structure
from was_search.errors import ModelError
from was_search.shape import PROJECTIONS

InputFunction = Callable[[int, int, Tensor], Tensor]
"""(block, projection, input [batch, positions, d]) -> what the projection sees; a group goes by its first member.

Autograd brings a group's gradients together at its input, so a function's backward sees their sum.
"""


def hook_inputs(structure: Structure, function: InputFunction) -> list[RemovableHandle]:
    """Put ``function`` before the linear maps of every masked input; returns the hooks to remove.

    Raises:
        ModelError: in a forward: projections that share a mask read different inputs.
    """
    return [
        linear.register_forward_pre_hook(once)
        for masked in structure.inputs()
        for once in [_Once(masked, function)]
        for linear in masked.linears
    ]


class _Once:
    """The hook of all linear maps of one masked input. Keeps the input until the last of them has read it."""

    def __init__(self, masked: MaskedInput, function: InputFunction) -> None:
        self._masked = masked
        self._function = function
        self._served: set[nn.Module] = set()
        self._given: tuple[Tensor, Tensor] | None = None

    def __call__(self, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x: Tensor = args[0]
        # A map that comes twice begins a new forward: the one before was broken off.
        if self._given is None or linear in self._served:
            self._served.clear()
            self._given = (x, self._function(self._masked.block, self._masked.members[0], x))
        elif x is not self._given[0]:
            names = ", ".join(PROJECTIONS[p] for p in self._masked.members)
            raise ModelError(
                f"block {self._masked.block}: {names} read different inputs and cannot share a mask; "
                "use --masks separate"
            )
        y = self._given[1]
        self._served.add(linear)
        if len(self._served) == len(self._masked.linears):
            self._served.clear()
            self._given = None
        return (y,)
