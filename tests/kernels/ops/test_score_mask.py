from __future__ import annotations

import pytest
import torch

from tests.kernels.where import need_kernels
from was_kernels.ops.score_mask import score_mask
from was_search.masks.score import masked

need_kernels()

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, but for the payload of a NaN."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def case(*shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(dtype)
    return x, torch.rand(shape[-1], generator=generator) + 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33,), (1, 127), (5, 300), (2, 3, 65), (1, 7, 1), (2, 2, 2, 1025), (3, 1, 2048)])
def test_equals_masked(device, dtype, shape):
    x, norms = case(*shape, dtype=dtype)
    for threshold in (-1.0, 0.0, 1e-50, 0.05, 0.4, 1.5, 1e30):
        found = score_mask(x.to(device), norms.to(device), threshold)
        assert same(found.cpu(), masked(x, norms, threshold)), threshold


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_at_the_threshold_is_kept(device, dtype):
    x = torch.tensor([[0.5, -0.5, 0.25, 1.0, 0.49]], dtype=dtype)
    norms = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.5])
    found = score_mask(x.to(device), norms.to(device), 0.25).cpu()
    assert found[0, :4].tolist() == [0.5, -0.5, 0.25, 1.0]
    assert found[0, 4] == 0.0
    above = score_mask(x.to(device), norms.to(device), 0.25 + 2**-24).cpu()
    assert above.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_of_rounded_products(device, dtype):
    # Thresholds that are scores themselves, rounded in float32: the comparison must see the same rounding.
    x, norms = case(1, 300, dtype=dtype, seed=3)
    scores = x.abs().float() * norms
    for threshold in scores[0, ::37].tolist():
        found = score_mask(x.to(device), norms.to(device), threshold).cpu()
        assert same(found, masked(x, norms, threshold))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_as_the_reference(device, dtype):
    x = torch.tensor([[NAN, INF, -INF, 0.0, -0.0, 1.0, INF, NAN]], dtype=dtype)
    norms = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, INF, 0.0, 0.0])
    for threshold in (0.0, 0.5, INF):
        found = score_mask(x.to(device), norms.to(device), threshold).cpu()
        assert same(found, masked(x, norms, threshold)), threshold
    dropped = score_mask(x.to(device), norms.to(device), 0.5).cpu()
    assert dropped[0, 0] == 0.0  # a NaN score is not kept
    assert dropped[0, 6] == 0.0  # inf * 0 is one, too


def test_layouts_are_read_right(device):
    x, norms = case(3, 8, 65, dtype=torch.float32)
    x, norms = x.to(device), norms.to(device)
    for view in (
        x[:, 2:],
        x[:, ::2],
        x.transpose(0, 1),
        x[1:2, 3:4],
        x.expand(2, 3, 8, 65),
        x[:, :, 5:][..., ::2],
    ):
        width = view.shape[-1]
        found = score_mask(view, norms[:width], 0.4)
        assert found.is_contiguous()
        assert same(found, masked(view, norms[:width], 0.4))


def test_dense_rows_are_left_alone(device):
    x, norms = case(2, 5, 33, dtype=torch.float32)
    x[0, 0, 0] = NAN
    dense = torch.tensor([[True, False, False, True, False], [False, True, False, False, False]])
    found = score_mask(x.to(device), norms.to(device), 0.6, dense.reshape(-1).to(device)).cpu()
    assert same(found, torch.where(dense[..., None], x, masked(x, norms, 0.6)))


def test_nothing_to_do(device):
    x, norms = case(4, 33, dtype=torch.float32)
    x, norms = x.to(device), norms.to(device)
    assert score_mask(x, norms, 0.0) is x
    assert score_mask(x[:0], norms, 0.5).shape == (0, 33)
    double = score_mask(x.double(), norms, 0.5)  # no kernel: the reference
    assert same(double, masked(x.double(), norms, 0.5))


def test_the_registered_op(device):
    x, norms = case(2, 3, 65, dtype=torch.float32)
    x, norms = x.to(device), norms.to(device)
    for threshold, dense in ((0.4, None), (0.0, None), (0.4, torch.ones(6, dtype=torch.bool, device=device))):
        arguments = (x, norms, threshold, dense)
        torch.library.opcheck(
            torch.ops.was.score_mask.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        assert same(torch.ops.was.score_mask(*arguments), score_mask(*arguments))


def test_refusals(device):
    x, norms = case(4, 33, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"norms: contiguous float32 \[33\] needed, got torch.float16 \[33\]"):
        score_mask(x, norms.half(), 0.5)
    with pytest.raises(ValueError, match=r"norms: .* got torch.float32 \[32\]"):
        score_mask(x, norms[:-1], 0.5)
    with pytest.raises(ValueError, match="dense: one bool per row"):
        score_mask(x, norms, 0.5, torch.ones(3, dtype=torch.bool))


@pytest.mark.gpu
def test_cuda_graph(cuda):
    x, norms = (t.to(cuda) for t in case(2, 16, 300, dtype=torch.float16))
    score_mask(x, norms, 0.4)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = score_mask(x, norms, 0.4)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert same(y, masked(x, norms, 0.4))
