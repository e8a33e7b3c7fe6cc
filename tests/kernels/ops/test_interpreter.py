"""Runs the tests that take ``device`` under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]
FILES = (
    "ops/test_correction_passes.py",
    "ops/test_gradient_passes.py",
    "ops/test_mask_input.py",
    "ops/test_score_mask.py",
    "ops/test_sparse_gemv.py",
    "ops/test_sparse_gemv_rounded.py",
    "runtime/test_sparse_linear.py",
)


@pytest.mark.slow(seconds=40)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_on_cpu_under_the_interpreter() -> None:
    """One process for all files, since each would import torch and triton anew."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    files = [str(KERNELS / file) for file in FILES]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider"],
        cwd=KERNELS.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout, run.stdout[-2000:]
