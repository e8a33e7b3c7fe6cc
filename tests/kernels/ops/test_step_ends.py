from __future__ import annotations

import pytest
import torch

from tests.doubles.tiny_models import model_of
from was_kernels.ops.reference import rms_norm as plain_rms_norm
from was_kernels.ops.step_ends import begin_step, rms_norm


def test_the_beginning_of_a_step(op_device):
    half = torch.float16 if op_device == "cuda" else torch.float32
    model = model_of("llama", op_device, half, hidden_size=512, num_attention_heads=8)
    rotary, table = model.model.rotary_emb, model.model.embed_tokens.weight
    tokens = torch.tensor([5, 96, 0], device=op_device)
    for positions in (torch.tensor([7, 0, 4000], device=op_device), torch.tensor([12], device=op_device)):
        x, cos, sin, dense, squares = begin_step(
            tokens, table, positions, rotary.inv_freq.float(), scaling=1.5, prefix=12
        )
        expected = rotary(table, positions[:, None])
        assert torch.equal(x, table[tokens])
        torch.testing.assert_close(cos, 1.5 * expected[0][:, 0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(sin, 1.5 * expected[1][:, 0], rtol=2e-3, atol=2e-3)
        assert dense.tolist() == [bool(p < 12) for p in positions.expand(3)]
        torch.testing.assert_close(squares.sum(1), x.float().square().sum(1))


@pytest.mark.parametrize("d", [8, 520, 4096])
def test_the_norm_behind_the_last_block(op_device, d):
    half = torch.bfloat16 if op_device == "cuda" else torch.float32
    made = torch.Generator().manual_seed(d)
    x, weight = (
        torch.randn(3, d, generator=made).to(op_device, half),
        torch.randn(d, generator=made).to(op_device, half),
    )
    x[1] = 0.0
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5), rtol=1e-2, atol=1e-6)
    torch.library.opcheck(torch.ops.was.rms_norm, (x, weight, 1e-5))
