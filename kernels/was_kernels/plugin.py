"""Make our plug-in known to transformers, now if it is loaded and else as soon as it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AWAITED = "transformers.quantizers.auto"
_PLUGIN = "was_kernels.runtime.transformers_plugin"


def register() -> None:
    """Register with transformers. Nothing is imported for that before transformers' own part is."""
    if _AWAITED in sys.modules:
        import_module(_PLUGIN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the awaited module as others do, and has the plug-in imported after it."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AWAITED or self._looking:
            return None
        self._looking = True
        try:
            found = find_spec(name)
        finally:
            self._looking = False
        if found is not None and found.loader is not None:
            found.loader = _Loader(found.loader)
            sys.meta_path.remove(self)
        return found


class _Loader(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        import_module(_PLUGIN)
