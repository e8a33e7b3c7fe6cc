"""Fused attention of one token: the plain op against its parts on CPU, the CUDA kernel against the plain op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import was_kernels.ops.attend as attend_module
from tests.kernels.gemv_group import NAN
from was_kernels.ops.attend import AttendStep, attend, attend_in_parts, choose_walk
from was_kernels.ops.attention_parts import AttentionParts
from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_launch import launch_gather, new_workspace
from was_kernels.ops.gather_step import GatherStep


def inputs(
    rows: int, heads: int, queries: int, head: int, longest: int, filled: int, dtype: torch.dtype, device: str
) -> AttendStep:
    made = torch.Generator().manual_seed(rows + heads * 3 + head + filled)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(device, dtype)

    angles = torch.randn((rows, head // 2), generator=made).repeat(1, 2).to(device)
    cache = [random(rows, heads, longest, head) for _ in range(2)]
    for half in cache:
        half[:, :, filled:] = NAN  # what lies past the end is never used
    return AttendStep(
        random(rows, (queries + 2) * heads * head),
        *cache,
        torch.tensor(filled, device=device),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        queries * heads,
        head**-0.5,
    )


def normed(given: AttendStep) -> AttendStep:
    """With an RMSNorm of each head."""
    slope = torch.linspace(-0.5, 0.5, given.keys.shape[3]).to(given.qkv)
    return replace(given, q_norm=1.0 + slope, k_norm=1.0 - slope, epsilon=1e-6)


def masked(given: AttendStep) -> AttendStep:
    """The last row does not see its first third."""
    mask = torch.ones(len(given.qkv), given.keys.shape[2], dtype=torch.bool, device=given.qkv.device)
    mask[-1, : int(given.length) // 3] = False
    return replace(given, mask=mask)


def copied(given: AttendStep, device: str = "cpu", dtype: torch.dtype | None = None) -> AttendStep:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        floats = dtype is not None and value.is_floating_point()
        return value.to(device, dtype if floats else value.dtype, copy=True)

    return AttendStep(**{name: move(value) for name, value in vars(given).items()})


def run(given: AttendStep, **options: Any) -> Tensor:
    workspace = new_workspace(given.qkv.device)
    found = attend(given, workspace, **options)
    assert not workspace.any()
    return found


def without_nan(given: AttendStep) -> AttendStep:
    """The cache's end is zero, as the plain op needs it: it multiplies by zero what is masked."""
    for half in (given.keys, given.values):
        half[:, :, int(given.length) :] = 0.0
    return given


def test_the_plain_op_is_rotation_append_and_softmax():
    given = inputs(2, 2, 2, 64, 20, 7, torch.float64, "cpu")
    rows, head = 2, 64
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :3] = False
    q, k, v = (t.view(rows, -1, head) for t in given.qkv.split([4 * head, 2 * head, 2 * head], dim=1))

    def turned(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., head // 2 :], x[..., : head // 2]), dim=-1)
        return x * given.cos[:, None] + half * given.sin[:, None]

    keys = torch.cat([given.keys[:, :, :7], turned(k)[:, :, None]], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([given.values[:, :, :7], v[:, :, None]], dim=2).repeat_interleave(2, dim=1)
    scores = torch.einsum("bhd,bhpd->bhp", turned(q), keys) * given.scaling
    scores = scores.masked_fill(~mask[:, None, :8], -float("inf"))
    expected = torch.einsum("bhp,bhpd->bhd", scores.softmax(-1), values)
    without_nan(given)
    found = run(replace(given, mask=mask))
    # Rotations are made in float32.
    torch.testing.assert_close(found, expected.reshape(rows, -1), rtol=1e-5, atol=1e-6)
    assert int(given.length) == 8
    torch.testing.assert_close(given.keys[:, :, 7], turned(k), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(given.values[:, :, 7], v)


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
    (1, 32, 1, 128, 2000, 1777),
    (3, 2, 6, 64, 5000, 4999),
    (1, 4, 8, 128, 20000, 19000),
    (16, 8, 4, 64, 1100, 0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_the_kernel_equals_the_plain_op_in_float64(cuda, dtype, case, with_norms, with_mask):
    given = inputs(*case, dtype, "cuda")
    filled = case[-1]
    given = normed(given) if with_norms else given
    given = masked(given) if with_mask else given
    exact = without_nan(copied(given, "cpu", torch.float64))
    expected = run(exact)
    twice = [copied(given, "cuda") for _ in range(2)]
    found = [run(twice[0]), run(twice[1], early=True)]
    torch.cuda.synchronize()
    assert torch.equal(*found)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double().cpu(), expected, rtol=8 * unit, atol=4 * unit)
    own = twice[0]
    assert int(own.length) == filled + 1
    parts = attend_in_parts(given)
    assert int(given.length) == filled
    torch.testing.assert_close(parts.merged(), found[0], rtol=2 * unit, atol=unit / 8)
    for mine, theirs in ((own.keys, given.keys), (own.values, given.values)):
        assert torch.equal(mine[:, :, :filled], theirs[:, :, :filled])
        assert torch.isfinite(mine[:, :, filled]).all()
        assert mine[:, :, filled + 1 :].isnan().all()


def test_a_row_of_zeros_takes_the_mean_of_the_values(op_device):
    """All scores are 0: what is seen counts alike. The norm of a zero head is zero, not NaN."""
    given = inputs(1, 2, 2, 64, 20, 7, torch.float16, op_device)
    given.qkv[:, : 4 * 64].zero_()
    ones = torch.ones(64, device=op_device, dtype=torch.float16)
    given = replace(given, q_norm=ones, k_norm=ones, epsilon=1e-6)
    without_nan(given)
    found = run(given)
    mean = given.values[:, :, :8].double().mean(dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(found.double(), mean.reshape(1, -1), rtol=2e-3, atol=2e-3)


def test_nan_and_infinity_stay_in_their_row(op_device):
    given = inputs(3, 2, 1, 64, 20, 7, torch.float16, op_device)
    without_nan(given)
    clean = run(copied(given, op_device))
    given.qkv[1, 3] = NAN  # a query
    given.qkv[2, 2 * 2 * 64 + 5] = float("inf")  # a value
    found = run(given)
    assert torch.equal(found[0], clean[0])
    assert found[1, :64].isnan().all()
    assert torch.equal(found[1, 64:], clean[1, 64:])
    assert found[2, 5] == float("inf")
    assert torch.equal(found[2, 64:], clean[2, 64:])


def test_a_workspace_without_a_counter_for_each_head_is_refused():
    given = inputs(3, 2, 1, 64, 20, 7, torch.float16, "cpu")
    with pytest.raises(ValueError, match="must be on cpu with qkv and have more than 6 counters, got 6 on cpu"):
        attend_module._launch(given, given.new_output(), new_workspace(given.qkv.device)[:6])


def test_inputs_that_are_not_contiguous(op_device):
    given = inputs(2, 2, 2, 64, 20, 7, torch.float16, op_device)
    without_nan(given)
    expected = run(copied(given, op_device))
    own = copied(given, op_device)

    def turned(half: Tensor) -> Tensor:
        """A cache that lies [batch, positions, heads, head size]."""
        return half.transpose(1, 2).contiguous().transpose(1, 2)

    qkv = torch.stack([own.qkv, own.qkv], dim=1)[:, 0]
    strided = replace(own, qkv=qkv, keys=turned(own.keys), values=turned(own.values))
    assert torch.equal(run(strided), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_op_is_well_formed(op_device):
    given = inputs(1, 2, 2, 64, 16, 3, torch.float16, op_device)
    without_nan(given)
    before = (given.qkv, given.keys, given.values, given.length, given.cos, given.sin)
    arguments = (*before, new_workspace(torch.device(op_device)), given.query_heads, given.scaling)
    torch.library.opcheck(torch.ops.was.attend, arguments, test_utils="test_schema")
    torch.library.opcheck(torch.ops.was.attend, arguments, test_utils="test_faketensor")


def test_attention_of_torch_agrees_with_the_plain_op_without_rotation():
    given = inputs(1, 2, 1, 64, 9, 8, torch.float32, "cpu")
    given.cos.fill_(1.0)
    given.sin.zero_()
    without_nan(given)
    q, k, v = given.qkv.view(1, 3, 2, 1, 64).unbind(1)
    keys, values = torch.cat([given.keys[:, :, :8], k], 2), torch.cat([given.values[:, :, :8], v], 2)
    expected = F.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(run(given), expected.reshape(1, -1))


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
    norms, workspace = torch.ones(channels, device=cuda), new_workspace(cuda)
    parts = attend_in_parts(given)
    merged = parts.merged()
    scores = merged.abs().float().flatten().sort().values
    at = len(scores) // 4 + int(scores[len(scores) // 4 : len(scores) // 2].diff().argmax())
    threshold = float(scores[at : at + 2].mean())  # far from every score
    residual = torch.randn(rows, width, device=cuda).to(dtype)
    sparse = SparseMap(ColumnWeight.as_stored(weight), norms, threshold)
    step = GatherStep(parts, [sparse], residual=residual)
    found, squares = launch_gather(step, workspace, want_squares=True, early=True)
    expected = gather_gemv(replace(step, x=merged), workspace)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * unit, atol=8 * unit)
    torch.testing.assert_close(squares.sum(1), found.float().square().sum(1), rtol=1e-5, atol=1e-5)
    assert int(given.length) == filled + 1
    assert not workspace.any()


@pytest.mark.parametrize("head", [32, 64, 128, 256])
@pytest.mark.parametrize("queries", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("longest", [1, 63, 1024, 5000, 131072])
def test_every_walk_fits_the_device(head, queries, longest):
    for heads in (1, 8, 40, 512):
        walk = choose_walk(heads, queries, head, longest, 132)
        assert 1 <= walk.splits <= 64
        assert walk.splits == 1 or walk.splits * heads <= 2 * 132 * (128 // min(head, 128))
        assert walk.warps * 32 * 8 % head == 0 and walk.residents * walk.warps * 32 <= 2048
        assert not walk.mma or (queries <= 8 and head in (64, 128))
        # Merged in shared memory beside a tile walk's queries, key and value: 48 KiB at most.
        assert 4 * walk.warps * queries * (head + 2) + walk.mma * 2 * (queries + 2) * head <= 48 * 1024
