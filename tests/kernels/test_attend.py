"""Fused attention of one token: the plain op against its parts on CPU, the CUDA kernel against the plain op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from was_kernels.attend import attend, attend_in_parts
from was_kernels.attention_parts import AttentionParts
from was_kernels.gather_gemv import counters, gather_gemv, launch_gather

NAN = float("nan")


def inputs(
    rows: int, heads: int, queries: int, head: int, longest: int, filled: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    made = torch.Generator().manual_seed(rows + heads * 3 + head + filled)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(device, dtype)

    angles = torch.randn((rows, head // 2), generator=made).repeat(1, 2).to(device)
    cache = [random(rows, heads, longest, head) for _ in range(2)]
    for half in cache:
        half[:, :, filled:] = NAN  # what lies behind the end is never used
    return {
        "qkv": random(rows, (queries + 2) * heads * head),
        "keys": cache[0],
        "values": cache[1],
        "length": torch.tensor(filled, device=device),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "arrived": counters(torch.device(device)),
        "query_heads": queries * heads,
        "scaling": head**-0.5,
    }


def copied(given: dict[str, Any], device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        floats = dtype is not None and value.is_floating_point()
        return value.to(device, dtype if floats else value.dtype, copy=True)

    return {name: move(value) for name, value in given.items()}


def test_the_plain_op_is_rotation_append_and_softmax():
    given = inputs(2, 2, 2, 64, 20, 7, torch.float64, "cpu")
    rows, head = 2, 64
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :3] = False
    q, k, v = (t.view(rows, -1, head) for t in given["qkv"].split([4 * head, 2 * head, 2 * head], dim=1))

    def turned(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., head // 2 :], x[..., : head // 2]), dim=-1)
        return x * given["cos"][:, None] + half * given["sin"][:, None]

    keys = torch.cat([given["keys"][:, :, :7], turned(k)[:, :, None]], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([given["values"][:, :, :7], v[:, :, None]], dim=2).repeat_interleave(2, dim=1)
    scores = torch.einsum("bhd,bhpd->bhp", turned(q), keys) * given["scaling"]
    scores = scores.masked_fill(~mask[:, None, :8], -float("inf"))
    expected = torch.einsum("bhp,bhpd->bhd", scores.softmax(-1), values)
    for half in ("keys", "values"):
        given[half][:, :, 7:] = 0.0  # the plain op multiplies what is masked by zero
    found = attend(**given, mask=mask)
    # Rotations are made in float32.
    torch.testing.assert_close(found, expected.reshape(rows, -1), rtol=1e-5, atol=1e-6)
    assert int(given["length"]) == 8
    torch.testing.assert_close(given["keys"][:, :, 7], turned(k), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given["values"][:, :, 7], v)


CASES = [
    # rows, key heads, queries each, head size, longest, filled
    (1, 32, 1, 128, 300, 256),
    (1, 8, 4, 128, 300, 0),
    (2, 8, 4, 128, 2000, 1333),
    (3, 4, 2, 64, 77, 50),
    (1, 2, 4, 256, 4000, 3999),
    (1, 2, 8, 128, 512, 17),
    (8, 3, 1, 64, 64, 63),
    (1, 2, 2, 32, 512, 256),
    (2, 3, 1, 32, 2000, 1999),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_equals_the_plain_op_in_float64(cuda, dtype, case, normed, masked):
    given = inputs(*case, dtype, "cuda")
    rows, _, _, head, longest, filled = case
    if normed:
        given["q_norm"] = 1.0 + torch.linspace(-0.5, 0.5, head, device=cuda).to(dtype)
        given["k_norm"] = 1.0 + torch.linspace(0.5, -0.5, head, device=cuda).to(dtype)
        given["epsilon"] = 1e-6
    if masked:
        given["mask"] = torch.ones(rows, longest, dtype=torch.bool, device=cuda)
        given["mask"][-1, : filled // 3] = False
    exact = copied(given, "cuda", torch.float64)
    for half in ("keys", "values"):
        exact[half][:, :, filled:] = 0.0
    expected = attend(**{**copied(exact, "cpu")})
    twice = [copied(given, "cuda") for _ in range(2)]
    found = [attend(**twice[0]), attend(**twice[1], early=True)]
    torch.cuda.synchronize()
    assert torch.equal(*found)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double().cpu(), expected, rtol=8 * unit, atol=4 * unit)
    own = twice[0]
    assert int(own["length"]) == filled + 1
    assert not own["arrived"].any()
    given.pop("arrived")
    parts = attend_in_parts(**given)
    assert int(given["length"]) == filled
    torch.testing.assert_close(parts.merged(), found[0], rtol=2 * unit, atol=unit / 8)
    for half in ("keys", "values"):
        assert torch.equal(own[half][:, :, :filled], given[half][:, :, :filled])
        assert torch.isfinite(own[half][:, :, filled]).all()
        assert own[half][:, :, filled + 1 :].isnan().all()


def test_a_row_of_zeros_takes_the_mean_of_the_values(op_device):
    """All scores are 0: what is seen counts alike. The norm of a zero head is zero, not NaN."""
    given = inputs(1, 2, 2, 64, 20, 7, torch.float16, op_device)
    given["qkv"][:, : 4 * 64].zero_()
    given |= {"q_norm": torch.ones(64), "k_norm": torch.ones(64), "epsilon": 1e-6}
    for name in ("q_norm", "k_norm"):
        given[name] = given[name].to(op_device, torch.float16)
    for half in ("keys", "values"):
        given[half][:, :, 7:] = 0.0
    found = attend(**given)
    mean = given["values"][:, :, :8].double().mean(dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(found.double(), mean.reshape(1, -1), rtol=2e-3, atol=2e-3)


def test_nan_and_infinity_stay_in_their_row(op_device):
    given = inputs(3, 2, 1, 64, 20, 7, torch.float16, op_device)
    for half in ("keys", "values"):
        given[half].nan_to_num_()
    clean = attend(**copied(given, op_device))
    given["qkv"][1, 3] = NAN  # a query
    given["qkv"][2, 2 * 2 * 64 + 5] = float("inf")  # a value
    found = attend(**given)
    assert torch.equal(found[0], clean[0])
    assert found[1, :64].isnan().all()
    assert torch.equal(found[1, 64:], clean[1, 64:])
    assert found[2, 5] == float("inf")
    assert torch.equal(found[2, 64:], clean[2, 64:])


def test_inputs_that_are_not_contiguous(op_device):
    given = inputs(2, 2, 2, 64, 20, 7, torch.float16, op_device)
    for half in ("keys", "values"):
        given[half].nan_to_num_()
    expected = attend(**copied(given, op_device))
    strided = copied(given, op_device)
    strided["qkv"] = torch.stack([given["qkv"], given["qkv"]], dim=1)[:, 0]
    for half in ("keys", "values"):  # a cache that lies [batch, positions, heads, head size]
        strided[half] = given[half].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(**strided), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_op_is_well_formed(op_device):
    given = inputs(1, 2, 2, 64, 16, 3, torch.float16, op_device)
    for half in ("keys", "values"):
        given[half].nan_to_num_()
    torch.library.opcheck(torch.ops.was.attend, tuple(given.values()), test_utils="test_schema")
    torch.library.opcheck(torch.ops.was.attend, tuple(given.values()), test_utils="test_faketensor")


def test_attention_of_torch_agrees_with_the_plain_op_without_rotation():
    given = inputs(1, 2, 1, 64, 9, 8, torch.float32, "cpu")
    given["cos"].fill_(1.0)
    given["sin"].zero_()
    for half in ("keys", "values"):
        given[half].nan_to_num_()
    q, k, v = given["qkv"].view(1, 3, 2, 1, 64).unbind(1)
    keys, values = torch.cat([given["keys"][:, :, :8], k], 2), torch.cat([given["values"][:, :, :8], v], 2)
    expected = F.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(attend(**given), expected.reshape(1, -1))


def test_parts_come_to_the_softmax_over_all():
    """Two splits of five positions, one with a head that saw nothing."""
    made = torch.Generator().manual_seed(0)
    scores, values = torch.randn(1, 1, 2, 5, generator=made), torch.randn(1, 1, 5, 64, generator=made)
    scores[0, 0, 1] = -float("inf")
    parts = torch.zeros(1, 1, 2, 2, 66)
    for s, places in enumerate((slice(0, 2), slice(2, 5))):
        for q in range(2):
            of = scores[0, 0, q, places] / torch.log(torch.tensor(2.0))
            peak = of.max()
            weights = torch.exp2(of - peak).nan_to_num(0.0)
            parts[0, 0, s, q] = torch.cat(
                ((weights[:, None] * values[0, 0, places]).sum(0), peak[None], weights.sum()[None])
            )
    found = AttentionParts(parts, torch.tensor(5), torch.float32)
    assert found.shape == (1, 128)
    expected = torch.cat((scores[0, 0, 0].softmax(-1) @ values[0, 0], torch.zeros(64)))
    torch.testing.assert_close(found.merged()[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_reader_merges_parts_and_moves_the_length_on(cuda, dtype, case):
    rows, heads, queries, head, _, filled = case
    given = inputs(*case, dtype, "cuda")
    width, channels = 136, heads * queries * head
    weight = torch.randn(channels, width, device=cuda).to(dtype)
    norms, arrived = torch.ones(channels, device=cuda), given.pop("arrived")
    parts = attend_in_parts(**given)
    merged = parts.merged()
    scores = merged.abs().float().flatten().sort().values
    at = len(scores) // 4 + int(scores[len(scores) // 4 : len(scores) // 2].diff().argmax())
    threshold = float(scores[at : at + 2].mean())  # far from every score
    residual = torch.randn(rows, width, device=cuda).to(dtype)
    found, squares = launch_gather(
        parts, [weight], [norms], [threshold], [None], arrived, residual=residual, want_squares=True, early=True
    )
    expected = gather_gemv(merged, [weight], [norms], [threshold], [None], arrived, residual=residual)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * unit, atol=8 * unit)
    torch.testing.assert_close(squares.sum(1), found.float().square().sum(1), rtol=1e-5, atol=1e-5)
    assert int(given["length"]) == filled + 1
    assert not arrived.any()
