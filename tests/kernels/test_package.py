from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import was_kernels
from tests.fresh_python import run_fresh
from was_kernels.ops.reference import score_mask_reference
from was_kernels.pass_ops import Ops, ops_for
from was_search.masks.histogram import N_BINS
from was_search.masks.score import mask_input, masked

KERNELS = Path(was_kernels.__file__).parents[2]


def test_importing_imports_no_triton_kernels():
    """All in one process, each after what imports less."""
    run = run_fresh(f"""
        import sys
        sys.path[:0] = {[str(KERNELS), str(KERNELS.parent)]!r}
        import was_kernels
        assert not {{"triton", "torch"}} & set(sys.modules), "was_kernels"
        for module in ("was_kernels.pass_ops", "was_kernels.runtime.sparse_model"):
            __import__(module)
            assert not {{"was_kernels.ops.score_mask", "was_kernels.ops.triton_launch"}} & set(sys.modules), module
    """)
    assert run.returncode == 0, run.stderr


def test_what_the_package_shows():
    from was_kernels.runtime.sparse_linear import SparseLinear
    from was_kernels.runtime.sparse_model import SparseModel, sparsify

    assert was_kernels.sparsify is sparsify
    assert was_kernels.SparseLinear is SparseLinear
    assert was_kernels.SparseModel is SparseModel
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        was_kernels.nothing  # noqa: B018


def test_triton_available_says_why(monkeypatch):
    good, reason = was_kernels.triton_available()
    assert good is torch.cuda.is_available()
    assert reason.startswith("triton ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert was_kernels.triton_available()[1].endswith(", no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "V100")
    assert "V100 has compute capability 7.0" in was_kernels.triton_available()[1]

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(was_kernels, "version", missing)
    assert was_kernels.triton_available() == (False, "triton is not installed")


def test_kernels_count_scores_into_the_bins_of_the_core():
    """The number stands twice, since an op imports torch and triton only."""
    gradient_passes = pytest.importorskip("was_kernels.ops.gradient_passes")
    assert gradient_passes.N_BINS == N_BINS


def test_ops_for_cpu_are_the_plain_ones():
    assert ops_for("cpu") == ops_for(torch.device("cpu")) == Ops()
    assert Ops().mask is mask_input


@pytest.mark.gpu
def test_ops_for_a_gpu_are_fused(cuda):
    assert ops_for("cuda") == ops_for(cuda)
    plain = Ops()
    assert all(getattr(ops_for("cuda"), name) is not op for name, op in vars(plain).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_reference_is_the_searchs_mask(dtype):
    torch.manual_seed(0)
    x, norms = torch.randn(3, 5, 65).to(dtype), torch.rand(65)
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), 0.0]).to(dtype)
    for threshold in (0.0, 0.2, 0.9):
        found = score_mask_reference(x, norms, threshold)
        assert torch.equal(found.nan_to_num(7.0), masked(x, norms, threshold).nan_to_num(7.0))
