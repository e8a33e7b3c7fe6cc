"""The compiled code for products and steps on a CPU, made once a process for each dtype, where there is a compiler."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from platformdirs import user_cache_path

from was_kernels.ops.compiled_step import DTYPES, CompiledStep
from was_kernels.ops.host_compiler import HostCompilerError


@lru_cache(maxsize=8)
def _step_of(dtype: torch.dtype) -> CompiledStep | str:
    try:
        return CompiledStep(dtype, _folder())
    except HostCompilerError as error:
        return str(error)


def compiled_step(dtype: torch.dtype) -> CompiledStep | None:
    """The compiled code for ``dtype``, compiled where no process has done so yet; None where that is impossible."""
    found = _step_of(dtype) if dtype in DTYPES else ""
    return None if isinstance(found, str) else found


def compiles_here(dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
    """Whether products on a CPU can be compiled here, and why not in one line."""
    found = _step_of(dtype)
    return (False, found) if isinstance(found, str) else (True, "")


def _folder() -> Path | None:
    try:
        found = user_cache_path("was-search")
    except RuntimeError:  # nobody's home, as in containers
        return None
    return found / "compiled" if found.is_absolute() else None  # an older platformdirs leaves "~" in it
