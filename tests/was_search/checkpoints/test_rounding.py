from __future__ import annotations

import numpy as np
import pytest
import torch

from was_search.checkpoints.rounding import dequantise, pack, quantise, unpack
from was_search.errors import ModelError
from was_search.weight_format import WeightFormat

SHAPES = [(128, 5), (33, 7), (1, 3), (300, 64), (64, 1)]
"""[out, in]: whole groups, short ones, odd rows."""


def weight_of(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(d_out * 31 + d_in)).to(dtype)


def plainly(packed: torch.Tensor, scales: torch.Tensor, form: WeightFormat, d_out: int) -> np.ndarray:
    """The weight [out, in] read value by value, in float64."""
    found = np.empty((d_out, len(packed)))
    for j in range(len(packed)):
        for o in range(d_out):
            byte = int(packed[j, o * form.bits // 8])
            q = byte if form.bits == 8 else (byte >> 4 if o % 2 else byte & 15)
            scale, offset = scales[j, o // form.group].double().tolist()
            found[o, j] = scale * q + offset
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("group", [32, 128])
def test_written_out_is_what_the_bits_say(bits, d_out, d_in, group):
    form = WeightFormat(bits, group)
    packed, scales = quantise(weight_of(d_out, d_in), form)
    assert packed.shape == (d_in, form.packed_bytes(d_out)) and packed.dtype == torch.uint8
    assert scales.shape == (d_in, form.n_groups(d_out), 2) and scales.dtype == torch.float16
    found = dequantise(packed, scales, bits, group, d_out)
    assert found.shape == (d_in, d_out) and found.dtype == torch.float32
    np.testing.assert_allclose(found.t().numpy(), plainly(packed, scales, form, d_out), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_moves_by_more_than_half_a_step(bits, dtype):
    form = WeightFormat(bits, 64)
    weight = weight_of(200, 11, dtype)
    packed, scales = quantise(weight, form)
    error = (dequantise(packed, scales, bits, 64, 200).t() - weight.float()).abs()
    step = scales[..., 0].float().repeat_interleave(64, dim=1)[:, :200].t()
    # float16's rounding of the scale (a part in 2048 of up to 2**bits - 1 steps) and of the offset moves the ends.
    slack = (2**bits - 1) * step / 2048 + scales[..., 1].abs().max() / 2048
    assert bool((error <= step / 2 + slack).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_of_one_value_is_exact(bits):
    weight = torch.full((40, 3), 0.375)
    weight[:, 1] = 0.0
    packed, scales = quantise(weight, WeightFormat(bits, 32))
    assert torch.equal(dequantise(packed, scales, bits, 32, 40), weight.t())


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_pack_and_unpack(width):
    q = torch.randint(0, 16, (5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(q, 4), 4, width), q)
    assert torch.equal(unpack(pack(q, 8), 8, width), q)


def test_chunks_do_not_show(monkeypatch):
    from was_search.checkpoints import rounding

    weight, form = weight_of(130, 50), WeightFormat(4, 64)
    whole = quantise(weight, form)
    monkeypatch.setattr(rounding, "_CHUNK", 130 * 7)
    for found, expected in zip(quantise(weight, form), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_refuses_what_float16_cannot_hold(value):
    weight = weight_of(64, 4)
    weight[3, 2] = value
    with pytest.raises(ModelError, match="not finite or exceed float16, and cannot be rounded; use --weights none"):
        quantise(weight, WeightFormat(4))
