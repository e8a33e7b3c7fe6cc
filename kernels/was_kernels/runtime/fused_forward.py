"""Let a module of transformers take some forwards through our own code, and all others through its class's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol

from torch import nn


class FusedForward(Protocol):
    """Our code that runs in the place of a module's forward, and of those ``methods`` of it that it names, if any."""

    def forward(self, plain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """The module's output for ``args`` and ``given``; ``plain`` is the class's own forward, unbound."""
        ...


_HARMLESS = frozenset(("transformers.utils.output_capturing", "was_kernels.runtime.positions"))
"""Modules of code whose hooks do nothing that a fused forward leaves out: transformers' stay on blocks and attentions
once their outputs were wanted, and ours on a decoder tell which tokens are dense."""


def is_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether any of ``modules`` has other code on its forward, which a fused forward would not call.

    Such code is a hook, or a forward of the module's own in the place of its class's, as accelerate gives to the
    modules of a model that it spreads over devices.
    """
    return any(
        "forward" in vars(module)
        or any(
            getattr(hook, "__module__", "") not in _HARMLESS
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
        for module in modules
    )


def hooks_of(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """The collections in which ``modules`` keep their hooks on a forward: all empty where there are none."""
    return tuple(hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks))


def fuse(module: nn.Module, step: FusedForward) -> None:
    """Call ``step`` in the place of the forward of ``module``, until :func:`unfuse`.

    The module becomes one of a subclass with its own class's name: names, parameters and hooks stay as they are, and
    ``torch.compile`` sees an ordinary method.
    """
    module._was_step = step  # type: ignore[assignment]
    kind: Any = type(module)
    module.__class__ = _fused(kind, getattr(step, "methods", ()))


def unfuse(module: nn.Module) -> None:
    """Undo :func:`fuse`; does nothing to a module that is not fused."""
    if "_was_step" in module.__dict__:
        module.__class__ = type(module).__mro__[1]
        del module._was_step


@lru_cache(maxsize=16)
def _fused(kind: Any, methods: tuple[str, ...]) -> type[nn.Module]:
    own = {name: _method(kind, name) for name in ("forward", *methods) if hasattr(kind, name)}
    return type(kind.__name__, (kind,), {**own, "__module__": kind.__module__})


def _method(kind: Any, name: str) -> Any:
    plain = getattr(kind, name)

    def method(self: Any, *args: Any, **given: Any) -> Any:
        return getattr(self._was_step, name)(plain, args, given)

    method.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    method.__name__ = name
    return method
