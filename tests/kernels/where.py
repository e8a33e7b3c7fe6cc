"""Where Triton kernels run in this test process."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET", "") == "1"


def need_kernels() -> None:
    """Skip the module where no kernel runs: ``test_interpreter.py`` runs it in a process of its own then."""
    if not INTERPRETER and not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_interpreter.py runs this file on CPU", allow_module_level=True)
