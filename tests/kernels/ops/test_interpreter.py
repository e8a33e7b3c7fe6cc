"""Runs the tests that take ``device`` under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    "test_gradient_passes.py",
    "test_mask_input.py",
    "test_score_mask.py",
    "test_sparse_gemv.py",
    "test_sparse_gemv_rounded.py",
    "test_sparse_linear.py",
)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
@pytest.mark.parametrize("file", FILES)
def test_on_cpu_under_the_interpreter(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / file),
        "-q",
        "-x",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout, run.stdout[-2000:]
