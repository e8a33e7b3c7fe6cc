"""Products by bags against float64, and cutoffs against the scores that they stand for."""

from __future__ import annotations

import pytest
import torch

from was_kernels.ops.column_bags import ColumnBags, KeptList, bags_of, cutoffs
from was_kernels.ops.reference import kept_channels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((65, 33), (1, 1), (48, 97), (80, 48), (576, 192), (300, 64))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kept", ["some", "none", "all", "none of one row"])
def test_equals_the_masked_product_in_float64(dtype, shape, rows, kept):
    d, width = shape
    x, columns = drawn(rows, d).to(dtype), drawn(d, width, seed=1).to(dtype)
    keep = drawn(rows, d, seed=2) > 0.0
    if kept in ("none", "all"):
        keep[:] = kept == "all"
    elif kept == "none of one row":
        keep[rows - 1] = False
    expected = torch.where(keep, x, 0.0).double() @ columns.double()
    size = torch.where(keep, x, 0.0).double().abs() @ columns.double().abs()
    for threads in (1, 2, 7):
        found = ColumnBags(columns, threads).product(KeptList.of(x, keep))
        assert found.dtype == dtype and found.shape == (rows, width)
        # A float32 sum of d products, rounded once.
        bound = torch.finfo(dtype).eps * expected.abs() + 2e-7 * d * size + torch.finfo(dtype).tiny
        assert bool(((found.double() - expected).abs() <= bound).all())


def test_the_number_of_bags_changes_no_bit():
    x, columns = drawn(3, 512), drawn(512, 384, seed=1)
    kept = KeptList.of(x, drawn(3, 512, seed=2) > 0.3)
    found = [ColumnBags(columns, threads).product(kept) for threads in (1, 2, 3, 8)]
    assert len({ColumnBags(columns, threads).bags for threads in (1, 2, 3, 8)}) == 4
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("width", "threads", "bags"),
    [
        (2048, 1, 1),
        (2048, 2, 2),
        (2048, 16, 16),
        (576, 4, 4),
        (192, 5, 6),
        (33, 8, 1),
        (97, 2, 1),
        (64, 64, 2),
        (1, 4, 1),
    ],
)
def test_bags(width, threads, bags):
    """Each thread has one where widths allow it; no bag is narrow, and all are as wide."""
    assert bags_of(width, threads) == bags


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1e-30, 1e-3, 0.5, 3.0, 1e5, 1e30, float("inf")])
def test_cutoffs_are_the_masks_exactly(dtype, threshold):
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([1e-20, 1e-3, 1.0, 1e4])[torch.randint(0, 4, (4096,), generator=generator)]
    norms = torch.rand(4096, generator=generator) * scales
    norms[:4] = torch.tensor([0.0, torch.inf, torch.nan, 1e-42])
    least = cutoffs(norms, threshold, dtype)
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    neighbours = [(least.view(whole) + by).view(dtype) for by in (-2, -1, 0, 1, 2)]
    special = [torch.full_like(least, value) for value in (0.0, torch.inf, torch.nan)]
    for x in (*neighbours, *special, drawn(4096).to(dtype), -drawn(4096).to(dtype)):
        assert torch.equal(x.abs() >= least, kept_channels(x, norms, threshold))
