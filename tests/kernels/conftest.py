"""The device of the op tests.

Triton's interpreter must be chosen before triton's first import and rules out the GPU for the whole process. So
the tests that take ``device`` run on CUDA by default, and on CPU where TRITON_INTERPRET=1 is set:
``test_interpreter.py`` runs them that way in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.where import INTERPRETER, look_names_up_once
from was_kernels.runtime import decode_block, decode_model, sparse_model

if INTERPRETER:
    look_names_up_once()


@pytest.fixture(params=["interpreter"] if INTERPRETER else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device on which Triton kernels run in this process."""
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests that make sense only there; they carry the mark ``gpu`` themselves."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def op_device(request: pytest.FixtureRequest) -> str:
    """CPU, where the CUDA ops are plain torch, and the GPU if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def dtype(op_device: str, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The model's; on CPU the fused path is let in for float32."""
    if op_device == "cuda":
        return torch.bfloat16
    for module in (decode_block, decode_model):
        monkeypatch.setattr(module, "HALF", (torch.float32,))
    monkeypatch.setattr(
        sparse_model, "_choose_backend", lambda backend, _: "cuda" if backend == "cuda" else "reference"
    )
    return torch.float32
