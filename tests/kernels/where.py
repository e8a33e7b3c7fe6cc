"""Where Triton kernels run in this test process."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET", "") == "1"


def need_kernels() -> None:
    """Skip the module where no kernel runs: ``test_interpreter.py`` runs it in a process of its own then."""
    if not INTERPRETER and not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_interpreter.py runs this file on CPU", allow_module_level=True)


def look_names_up_once() -> None:
    """Triton's interpreter looks through all names of its language at every launch, a fifth of its tests' time."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(package):
            if getattr(package, name) is member:  # this launch has not replaced it yet
                interpreter._patch_attr(package, name, member, builder, scope)

    assert interpreter._patch_builtin and interpreter._patch_attr
    interpreter._patch_builtin = patch
