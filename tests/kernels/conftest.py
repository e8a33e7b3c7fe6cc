"""Where the op tests run.

Triton's interpreter must be chosen before triton's first import and rules out the GPU for the whole process. So the
tests that take ``device`` run on CUDA by default (skipped without one), and on CPU where TRITON_INTERPRET=1 is set:
``test_interpreter.py`` runs them that way in a process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET", "") == "1"


@pytest.fixture(
    params=["interpreter"] if INTERPRETER else [pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device on which Triton kernels run in this process."""
    if request.param == "interpreter":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_interpreter.py runs this test on CPU")
    return torch.device("cuda")
