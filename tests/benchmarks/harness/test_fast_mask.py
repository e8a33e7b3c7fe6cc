from __future__ import annotations

import os
import sys

import pytest
import torch

from benchmarks.harness.fast_mask import device_mask
from tests.fresh_python import run_fresh
from was_search.masks.score import masked

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 9, 128), (5, 33, 24)]


def check(device: str, shape: tuple[int, ...], dtype: torch.dtype, threshold: float, prefix: int) -> None:
    """Bit for bit the reference after the prefix, and the input itself within it; a threshold for each sequence."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).to(dtype)
    norms = torch.rand(shape[-1], device=device)
    n = shape[0]
    # Strided views, as of one projection among many.
    thresholds = (threshold * torch.arange(1, n + 1, device=device))[:, None].expand(n, 2).contiguous()[:, 1]
    counts = torch.full((n, 3), 5, dtype=torch.int32, device=device)
    found = device_mask(x, norms, thresholds, prefix, counts[:, 2])
    for i in range(n):
        body = masked(x[i, prefix:], norms, float(thresholds[i]))
        assert torch.equal(found[i], torch.cat([x[i, :prefix], body]))
        score = x[i, prefix:].abs().float() * norms
        assert int(counts[i, 2]) == 5 + int((score < thresholds[i]).sum())
    assert (counts[:, :2] == 5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 100.0])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_plain_torch_against_the_reference(shape, threshold, prefix):
    check("cpu", shape, torch.float32, threshold, prefix)


def test_the_kernel_in_the_interpreter():
    """A process of its own: Triton reads the variable when it is first imported."""
    code = (
        "import torch; from triton.runtime.jit import JITFunction\n"
        "from benchmarks.harness import fast_mask; from tests.benchmarks.harness.test_fast_mask import SHAPES, check\n"
        "assert not isinstance(fast_mask._device_mask_kernel, JITFunction)\n"
        "for shape in SHAPES:\n"
        "    for dtype in (torch.float32, torch.float16):\n"
        "        for threshold, prefix in ((0.0, 0), (0.4, 1), (0.4, 3), (100.0, 1)):\n"
        "            check('cpu', shape, dtype, threshold, prefix)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = run_fresh(code, environment)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_on_a_gpu(shape, dtype):
    for threshold, prefix in ((0.0, 0), (0.4, 1), (0.4, 3), (100.0, 1)):
        check("cuda", shape, dtype, threshold, prefix)
