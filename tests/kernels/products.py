"""Which code makes the products on a CPU, whatever is faster."""

from __future__ import annotations

import pytest

from was_kernels.runtime import compiled_code
from was_kernels.runtime.compiled_code import compiles_here
from was_kernels.runtime.compiled_product import CompiledProduct
from was_kernels.runtime.cpu_product import CpuProduct

WAYS = ("compiled", "bags", "dense")


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products made by ``way``, one of :data:`WAYS`; skips where nothing can be compiled."""
    if way == "compiled":
        good, why_not = compiles_here()
        if not good:
            pytest.skip(why_not)
        monkeypatch.setattr(CompiledProduct, "_measured", lambda self, rows, threads: 10**9)
        return
    compile_nothing(monkeypatch)
    most = 10**9 if way == "bags" else -1
    monkeypatch.setattr(CpuProduct, "_measured", lambda self, rows, threads: most)


def compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no compiler."""
    monkeypatch.setattr(compiled_code, "_step_of", lambda dtype: "no compiler")
