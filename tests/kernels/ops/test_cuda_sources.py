"""The CUDA sources themselves, run on a CPU: against the plain ops, with the launches' own code.

This shows that they compute the right thing, read at multiples of what they read, and give the same bits in whatever
order blocks run. Overlap of kernels, memory models and speed show on a GPU only.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.emulated_gpu import COMPILER, EmulatedGpu, translated
from tests.kernels.gemv_group import rounded
from tests.kernels.ops.test_attend import copied, inputs, masked, normed, without_nan
from was_kernels.ops import attend as attend_module
from was_kernels.ops import gather_launch, step_ends
from was_kernels.ops.attend import Walk, attend, attend_in_parts
from was_kernels.ops.attention_parts import AttentionParts
from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.correction import Correction
from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_launch import launch_gather, new_workspace
from was_kernels.ops.gather_step import GatherStep, gather_reference
from was_kernels.ops.nvrtc import SOURCES
from was_kernels.ops.reference import rms_norm

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not there to compile the CUDA sources for a CPU")

HALF, BRAIN = torch.float16, torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    return EmulatedGpu(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def processors() -> int:
    """Of the emulated GPU: with more of them a launch is cut into more shares."""
    return 6


@pytest.fixture
def gpu(built: EmulatedGpu, processors: int, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """Launches go to the emulated GPU."""
    for module in (gather_launch, attend_module, step_ends):
        monkeypatch.setattr(module, "cuda_kernel", built.kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    built.launches.clear()
    return built


class Launch:
    """Inputs of a launch, and what it should give."""

    def __init__(self, rows: int, d_in: int, widths: list[int], dtype: torch.dtype, **options: Any) -> None:
        made = torch.Generator().manual_seed(rows * d_in)
        self.options = options
        self.x = torch.randn(rows, d_in, generator=made).to(dtype)
        self.weights = [(torch.randn(d_in, n, generator=made) * d_in**-0.5).to(dtype) for n in widths]
        self.norms = [torch.rand(d_in, generator=made) + 0.5 for _ in widths]
        self.thresholds = [0.9 * (i + 1) / len(widths) for i in range(len(widths))]
        self.biases = [torch.randn(n, generator=made).to(dtype) if options.get("bias") else None for n in widths]
        self.norm_weight = (torch.rand(d_in, generator=made) + 0.5).to(dtype)
        width = widths[0] if options.get("gated") else sum(widths)
        self.residual = torch.randn(rows, width, generator=made).to(dtype)
        self.dense = torch.arange(rows) % 2 == 1
        self.vectors = [(torch.rand(n, generator=made) + 0.5, torch.randn(n, generator=made)) for n in widths]
        self.workspace = new_workspace(CPU)

    def how(self) -> dict[str, Any]:
        given = self.options
        return {
            "gated": given.get("gated", False),
            "norm_weight": self.norm_weight if "norm" in given else None,
            "epsilon": 1e-5,
            "residual": self.residual if given.get("residual") else None,
            "dense": self.dense if given.get("dense") else None,
        }

    def squares(self) -> Tensor | None:
        """Of the parts of x, more parts than lanes of a warp."""
        if self.options.get("norm") != "by squares":
            return None
        parts = torch.arange(self.x.shape[1]) % 40
        return torch.zeros(len(self.x), 40).index_add_(1, parts, self.x.float().square())

    def step(self, dtype: torch.dtype) -> GatherStep:
        """With x, weights and biases of ``dtype``."""
        maps = [
            SparseMap(
                ColumnWeight.as_stored(weight.to(dtype)), norms, threshold, None if bias is None else bias.to(dtype)
            )
            for weight, norms, threshold, bias in zip(
                self.weights, self.norms, self.thresholds, self.biases, strict=True
            )
        ]
        if self.options.get("corrected"):
            given = zip(maps, self.vectors, strict=True)
            maps = [replace(sparse, correction=Correction.of(*pair, sparse.bias)) for sparse, pair in given]
        return GatherStep(self.x.to(dtype), maps, **self.how())

    def run(self, step: GatherStep | None = None) -> tuple[Tensor, Tensor | None]:
        step = self.step(self.x.dtype) if step is None else step
        found = launch_gather(
            step, self.workspace, squares=self.squares(), want_squares=self.options.get("residual", False)
        )
        assert not self.workspace.any()
        return found

    def expected(self) -> Tensor:
        # The norm rounds x to its dtype: double precision would keep other channels.
        return gather_reference(self.step(torch.float64 if "norm" not in self.options else self.x.dtype))


def close(found: Tensor, exact: Tensor) -> None:
    """A few roundings to the dtype of sums of order one; a channel more or less would be 0.02 and more."""
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact.double(), rtol=4 * unit, atol=4 * unit)


LAUNCHES = [
    (296, [136, 40], {}),
    (1544, [264, 64, 64], {"norm": "by squares", "bias": True, "dense": True}),
    (520, [264, 64, 64], {"norm": "by itself", "bias": True}),
    (1544, [344, 344], {"norm": "by squares", "gated": True, "dense": True}),
    (5000, [136], {"residual": True, "dense": True}),
]
FURTHER = [(1, BRAIN, 2), (2, BRAIN, 6), (13, BRAIN, 2)]
"""Launches of the same kinds: each is a source of its own for the compiler."""


@pytest.mark.parametrize(
    ("rows", "dtype", "processors"),
    [(1, HALF, 6), (5, HALF, 6), *(pytest.param(*each, marks=pytest.mark.slow) for each in FURTHER)],
)
@pytest.mark.parametrize(("d_in", "widths", "options"), LAUNCHES)
def test_gather_gemv(gpu, rows, dtype, d_in, widths, options):
    launch = Launch(rows, d_in, widths, dtype, **options)
    found, squares = launch.run()
    close(found, launch.expected())
    if squares is not None:
        torch.testing.assert_close(squares.sum(1), found.float().square().sum(1), rtol=1e-5, atol=1e-5)
    gpu.seed += 1
    again, _ = launch.run()
    assert torch.equal(again, found)  # whoever comes last
    (_, macros, grid), _ = gpu.launches
    assert macros["MMA"] == (rows > 2)
    assert not macros["CORRECTED"]
    assert grid[1] == macros["SHARES"]


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, HALF), (2, BRAIN), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(5, HALF), (13, BRAIN)])],
)
@pytest.mark.parametrize(
    ("d_in", "widths", "options"),
    [
        (1544, [264, 64, 64], {"bias": True, "dense": True}),
        (520, [344, 344], {"norm": "by squares", "gated": True, "bias": True, "dense": True}),
        (5000, [136], {"residual": True}),
    ],
)
def test_gather_gemv_corrects_masked_rows(gpu, rows, dtype, d_in, widths, options):
    launch = Launch(rows, d_in, widths, dtype, corrected=True, **options)
    launch.thresholds[0] = 0.0
    found, squares = launch.run()
    close(found, launch.expected())
    if squares is not None:
        torch.testing.assert_close(squares.sum(1), found.float().square().sum(1), rtol=1e-5, atol=1e-5)
    ((_, macros, _),) = gpu.launches
    assert macros["CORRECTED"]


def test_a_residual_beside_several_maps(gpu):
    launch = Launch(2, 520, [264, 64, 64], HALF, residual=True)
    found, _ = launch_gather(launch.step(HALF), launch.workspace)
    close(found, launch.expected())


def test_a_launch_with_more_shares_than_there_is_room_for(gpu):
    launch = Launch(1, 1544, [344, 344], HALF, gated=True)
    expected, _ = launch.run()
    launch.workspace = launch.workspace[: gather_launch._COUNTERS + 7]
    found, _ = launch.run()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "corrected"), [(1, False), (2, False), (5, False), (1, True)])
def test_gather_gemv_of_rounded_weights(gpu, bits, rows, corrected):
    launch = Launch(rows, 1544, [288, 96], HALF, bias=True, corrected=corrected)
    stored = launch.step(HALF)
    maps = [replace(sparse, weight=rounded(sparse.weight.columns.t().contiguous(), bits, 32)) for sparse in stored.maps]
    step = replace(stored, maps=maps)
    expected = gather_gemv(step, launch.workspace)
    found, _ = launch.run(step)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)


CASES = [
    # rows, key heads, queries each, head size, longest, filled
    (1, 4, 1, 128, 300, 256),
    (2, 2, 3, 128, 40, 0),
    (3, 2, 2, 64, 77, 50),
    (1, 1, 4, 256, 200, 199),
    (2, 2, 2, 32, 300, 259),
]


TILED = [(1, 4, 1, 128, 300, 256), (2, 2, 3, 128, 40, 0), (3, 2, 2, 64, 77, 50), (1, 1, 8, 64, 700, 699)]


def plain_too(cases):
    """Each with norms and a mask, and without; without them the first alone is no slow one, for its compiler's time."""
    plain = [pytest.param(case, False, marks=pytest.mark.slow if i else ()) for i, case in enumerate(cases)]
    return [*plain, *((case, True) for case in cases)]


@pytest.mark.parametrize(("case", "normed_and_masked"), plain_too(CASES))
def test_attend(gpu, case, normed_and_masked):
    check_attention(gpu, case, normed_and_masked)


@pytest.mark.parametrize(("case", "normed_and_masked"), plain_too(TILED))
def test_attend_by_tiles(gpu, case, normed_and_masked, monkeypatch):
    walk = Walk(True, 2, 1, 3, 2)
    monkeypatch.setattr(attend_module, "choose_walk", lambda *_: walk)
    check_attention(gpu, case, normed_and_masked)
    assert all(macros["MMA"] for _, macros, _ in gpu.launches)


def check_attention(gpu, case, normed_and_masked):
    rows, heads, _, head, _, filled = case
    given = inputs(*case, HALF, "cpu")
    if normed_and_masked:
        given = masked(normed(given))
    exact = without_nan(copied(given, "cpu", torch.float64))
    expected = attend(exact, new_workspace(CPU))
    close_to = {"rtol": 2e-3, "atol": 5e-4}  # tiles round the weights of positions to halves
    parts = attend_in_parts(copied(given))
    torch.testing.assert_close(parts.merged().double(), expected, **close_to)
    assert int(parts.length) == filled
    for seed in range(2):
        gpu.seed = seed
        own, workspace = copied(given), new_workspace(CPU)
        found = own.new_output()
        attend_module._launch(own, found, workspace, advance=True)
        torch.testing.assert_close(found.double(), expected, **close_to)
        assert int(own.length) == filled + 1
        assert not workspace.any()
        key = own.keys[:, :, filled].double()
        torch.testing.assert_close(key, exact.keys[:, :, filled], rtol=2e-3, atol=2e-3)
        assert torch.equal(own.values[:, :, filled], given.qkv.view(rows, -1, head)[:, -heads:])


@pytest.mark.parametrize(("rows", "splits"), [(1, 3), (2, 3), (5, 3), (1, 16), (2, 37)])
def test_the_reader_of_attention_merges_its_parts(gpu, rows, splits):
    launch = Launch(rows, 1536, [136], HALF, residual=True, dense=True)
    parts = torch.randn(rows, 6, splits, 2, 130, generator=torch.Generator().manual_seed(rows))
    parts[..., -1] = parts[..., -1].abs() + 0.1
    parts[0, 1, :-1, :, -2:] = torch.tensor([-torch.inf, 0.0])  # a head of which most parts saw nothing
    parts[0, 1, :-1, :, :-2] = 0.0
    attended = AttentionParts(parts, torch.tensor(5), HALF)
    launch.x = attended.merged()
    found, _ = launch.run(replace(launch.step(HALF), x=attended))
    close(found, launch.expected())
    assert int(attended.length) == 6


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_the_ends_of_a_step(gpu, dtype):
    made = torch.Generator().manual_seed(0)
    table = torch.randn(97, 4104, generator=made).to(dtype)
    tokens, frequencies = torch.tensor([[5, 0], [96, 0], [0, 0]])[:, 0], torch.rand(32, generator=made)
    for positions in (torch.tensor([7, 0, 400]), torch.tensor([12])):
        x, cos, sin, dense, squares = step_ends._begin_on_gpu(tokens, table, positions, frequencies, 1.5, 12)
        plain = step_ends.begin_step(tokens, table, positions, frequencies, scaling=1.5, prefix=12)
        assert torch.equal(x, table[tokens])
        torch.testing.assert_close(cos, plain[1], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(sin, plain[2], rtol=1e-2, atol=1e-2)
        assert torch.equal(dense, plain[3])
        torch.testing.assert_close(squares.sum(1), x.float().square().sum(1))
    weight = torch.rand(4104, generator=made).to(dtype)
    found = step_ends._norm_on_gpu(table[:3], weight, 1e-5, True)
    close(found, rms_norm(table[:3], weight, 1e-5))


def test_no_assembly_is_left_out_of_sight():
    """Every function with assembly has a stand-in; what stays is the trap."""
    kernels = {"gather_gemv.cu": "gather_gemv", "attend.cu": "attend", "step_ends.cu": "begin_step"}
    assert {path.name for path in SOURCES.glob("*.cu")} == set(kernels)
    for file, name in kernels.items():
        assert not re.search(r"\basm\b", translated(SOURCES / file, name))


@pytest.mark.parametrize("barrier", ["__syncthreads();", ""])
def test_a_missing_barrier_is_found(gpu, tmp_path, barrier):
    """Threads take turns one way in one block and the other way in the next: in one of them the value is stale."""
    source = tmp_path / "reverse.cu"
    source.write_text(f"""
extern "C" __global__ void reverse(int* out) {{
    __shared__ int of_threads[64];
    of_threads[threadIdx.x] = 0;
    __syncthreads();
    of_threads[threadIdx.x] = threadIdx.x;
    {barrier}
    out[blockIdx.x * 64 + threadIdx.x] = of_threads[threadIdx.x < 63 ? threadIdx.x + 1 : 0];
}}
""")
    out = torch.full((2, 64), -1, dtype=torch.int32)
    gpu.kernel(source, "reverse", {}, 0).launch((2, 1), 64, [ctypes.c_void_p(out.data_ptr())])
    right = bool((out == torch.arange(1, 65) % 64).all())
    assert right == bool(barrier)
