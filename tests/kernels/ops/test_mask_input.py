from __future__ import annotations

import pytest
import torch

from tests.kernels.where import need_kernels
from was_kernels.ops.mask_input import mask_input
from was_search.masks import score

need_kernels()

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def check(device, x, norms, threshold, prefix):
    y, kept = mask_input(x.to(device), norms.to(device), threshold, prefix)
    wanted, count = score.mask_input(x, norms, threshold, prefix)
    assert y.dtype == x.dtype
    assert bool(((y.cpu() == wanted) | (y.cpu().isnan() & wanted.isnan())).all())
    assert kept.dtype == torch.int64
    assert int(kept) == int(count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 33), (3, 4, 300), (1, 9, 1025)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_equals_the_plain_one(device, dtype, shape, prefix):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(dtype)
    norms = torch.rand(shape[-1], generator=generator) + 0.1
    for threshold in (1e-6, 0.4, 1e30):
        check(device, x, norms, threshold, min(prefix, shape[1]))


def test_a_score_at_the_threshold_is_kept(device):
    x = torch.tensor([[[0.5, -0.5, 0.49, 0.0]]])
    y, kept = mask_input(x.to(device), torch.ones(4, device=device), 0.5, 0)
    assert y.flatten().tolist() == [0.5, -0.5, 0.0, 0.0]
    assert int(kept) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(device, dtype):
    x = torch.tensor([[[1.0, NAN, INF, -INF, 0.0], [NAN, 1.0, INF, 0.0, -0.0]]], dtype=dtype)
    for prefix in (0, 1):
        check(device, x, torch.ones(5), 0.5, prefix)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0])
def test_all_zero_all_dropped_and_all_kept(device, value):
    x = torch.full((2, 3, 33), value)
    y, kept = mask_input(x.to(device), torch.ones(33, device=device), 0.5, 0)
    assert torch.equal(y.cpu(), x if value > 0.5 else torch.zeros_like(x))
    assert int(kept) == (2 * 3 * 33 if value > 0.5 else 0)


def test_the_prefix_of_every_sequence_is_kept_and_not_counted(device):
    x = torch.full((3, 4, 8), 0.1)
    y, kept = mask_input(x.to(device), torch.ones(8, device=device), 0.5, 2)
    assert bool((y[:, :2] == x[:, :2].to(device)).all())
    assert not y[:, 2:].any()
    assert int(kept) == 0


def test_inputs_that_are_not_contiguous(device):
    x = torch.randn(6, 5, 50)[::2, :, ::2].transpose(0, 1)
    y, kept = mask_input(x.to(device), torch.ones(25, device=device), 0.7, 1)
    wanted, count = score.mask_input(x, torch.ones(25), 0.7, 1)
    assert torch.equal(y.cpu(), wanted)
    assert int(kept) == int(count)
