"""Time the sparse GEMVs on a GPU beside cuBLAS; append one JSON line per row to benchmarks/results/.

    python -m benchmarks.bench_sparse_gemv [--shapes 4096x4096,...] [--sparsities 0,0.5] [--batches 1,4] [--dtypes fp16]
    python -m benchmarks.bench_sparse_gemv --kernel cuda

A shape is d_in x d_out. Each figure is one call's share of a CUDA graph that walks over copies of the weight, so
many that none is still in the L2 cache, each with inputs of its own; p20/p50/p80 are over graph replays.
Sparsity is counted on those inputs: ``sparsity`` is the share of channels a row drops, ``skipped`` the share
that all rows of a batch drop, whose weights need not be read. The bytes limit is the time to read what must be
read (kept weight rows, x, norms) and write y at the read bandwidth measured first on the same GPU.
``dense_us`` is cuBLAS on the row-major weight. The CUDA kernel is launched as in a fused step: one call may start while
the one before it ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row
from was_kernels.ops.column_weight import ColumnWeight, SparseMap
from was_kernels.ops.gather_gemv import gather_gemv
from was_kernels.ops.gather_launch import new_workspace
from was_kernels.ops.gather_step import GatherStep
from was_kernels.ops.sparse_gemv import sparse_gemv
from was_kernels.timing.step import read_bandwidth

RESULTS = Path(__file__).parent / "results" / "sparse_gemv.jsonl"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROTATED_BYTES = 768 << 20  # several times the 50 MiB of an H200's L2, so that each call reads from memory
MAX_COPIES = 64


@dataclass(frozen=True)
class Row:
    """One measurement; times in microseconds."""

    kernel: str
    d_in: int
    d_out: int
    batch: int
    dtype: str
    nominal_sparsity: float
    sparsity: float
    skipped: float
    p20_us: float
    p50_us: float
    p80_us: float
    limit_us: float
    limit_share: float
    dense_p20_us: float
    dense_us: float
    dense_p80_us: float
    speedup: float
    read_tb_per_s: float
    max_error: float


def percentiles(calls: Sequence[Callable[[], object]], replays: int) -> tuple[float, float, float]:
    """p20, p50, p80 of one call in microseconds: all ``calls`` in one CUDA graph, timed by replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(5):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([1000.0 * start.elapsed_time(end) / len(calls) for start, end in events])
    low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, middle, high


def counted(x: Tensor, norms: Tensor, threshold: float) -> tuple[float, float]:
    """Shares of channels that a row drops, and that all rows drop; x [copies, batch, d_in], norms [copies, d_in]."""
    if threshold <= 0.0:
        return 0.0, 0.0
    dropped = x.abs().float() * norms[:, None] < threshold
    return float(dropped.float().mean()), float(dropped.all(dim=1).float().mean())


def dense_times(x: Tensor, weights_t: list[Tensor], replays: int) -> tuple[float, float, float]:
    """Percentiles of cuBLAS on row-major copies of the weights."""
    weights = [w.t().contiguous() for w in weights_t]
    return percentiles([partial(F.linear, x[i], weight) for i, weight in enumerate(weights)], replays)


def product(kernel: str) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """The named kernel as a function: x [B, d_in], weight_t [d_in, d_out], norms [d_in], threshold -> [B, d_out]."""
    workspace = new_workspace(torch.device("cuda"))

    def call(x: Tensor, weight_t: Tensor, norms: Tensor, threshold: float) -> Tensor:
        sparse = SparseMap(ColumnWeight.as_stored(weight_t), norms, threshold)
        if kernel == "triton":
            return sparse_gemv(x, sparse)
        return gather_gemv(GatherStep(x, [sparse]), workspace, early=True)

    return call


def measure(
    kernel: str,
    d_in: int,
    d_out: int,
    batch: int,
    dtype_name: str,
    sparsities: list[float],
    replays: int,
    bandwidth: float,
) -> list[Row]:
    """All sparsities of one shape, batch and dtype, with the dense product timed once beside them."""
    dtype, multiply = DTYPES[dtype_name], product(kernel)
    itemsize = torch.empty((), dtype=dtype).element_size()
    copies = max(2, min(MAX_COPIES, -(-ROTATED_BYTES // (d_in * d_out * itemsize))))
    torch.manual_seed(0)
    weights_t = [torch.randn(d_in, d_out, dtype=dtype, device="cuda") * d_in**-0.5 for _ in range(copies)]
    norms = torch.stack([w.float().norm(dim=1) for w in weights_t])
    x = torch.randn(copies, batch, d_in, dtype=dtype, device="cuda")

    dense = dense_times(x, weights_t, replays)
    scores = (x.abs().float() * norms[:, None]).flatten()
    sample = scores[:: max(1, scores.numel() // 1_000_000)]
    rows = []
    for nominal in sparsities:
        threshold = float(sample.quantile(nominal)) if nominal > 0.0 else 0.0
        sparsity, skipped = counted(x, norms, threshold)
        y = multiply(x[0], weights_t[0], norms[0], threshold)
        kept = (
            x[0].abs().float() * norms[0] >= threshold if threshold > 0.0 else torch.ones_like(x[0], dtype=torch.bool)
        )
        exact = torch.where(kept, x[0], 0.0).double() @ weights_t[0].double()
        times = percentiles(
            [partial(multiply, x[i], weights_t[i], norms[i], threshold) for i in range(copies)], replays
        )
        must_move = (1.0 - skipped) * d_in * d_out * itemsize + batch * (d_in + d_out) * itemsize + 4 * d_in
        limit_us = 1e6 * must_move / bandwidth
        rows.append(
            Row(
                kernel=kernel,
                d_in=d_in,
                d_out=d_out,
                batch=batch,
                dtype=dtype_name,
                nominal_sparsity=nominal,
                sparsity=sparsity,
                skipped=skipped,
                p20_us=times[0],
                p50_us=times[1],
                p80_us=times[2],
                limit_us=limit_us,
                limit_share=limit_us / times[1],
                dense_p20_us=dense[0],
                dense_us=dense[1],
                dense_p80_us=dense[2],
                speedup=dense[1] / times[1],
                read_tb_per_s=bandwidth / 1e12,
                max_error=float((y.double() - exact).abs().max()),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'shape':>12} {'B':>3} {'dtype':>5} {'sparsity':>8} {'p50 us':>8} {'limit':>6} {'dense us':>9} {'x':>5}"]
    for row in rows:
        lines.append(
            f"{f'{row.d_in}x{row.d_out}':>12} {row.batch:>3} {row.dtype:>5} {100 * row.sparsity:>7.1f}% "
            f"{row.p50_us:>8.1f} {100 * row.limit_share:>5.0f}% {row.dense_us:>9.1f} {row.speedup:>5.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--shapes", default="4096x4096,4096x11008,11008x4096", help="d_in x d_out, comma-separated")
    parser.add_argument("--sparsities", default="0,0.4,0.5,0.6,0.75")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--dtypes", default="fp16", help="fp16, bf16, fp32")
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: times on anything else would mean nothing")
    bandwidth = read_bandwidth(torch.device("cuda"))
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    rows: list[Row] = []
    sparsities = [float(s) for s in options.sparsities.split(",")]
    for dtype in options.dtypes.split(","):
        for batch in (int(b) for b in options.batches.split(",")):
            for shape in options.shapes.split(","):
                d_in, d_out = (int(n) for n in shape.split("x"))
                found = measure(options.kernel, d_in, d_out, batch, dtype, sparsities, options.replays, bandwidth)
                for row in found:
                    append_row(options.output, asdict(row) | conditions())
                rows.extend(found)
                torch.cuda.empty_cache()
    print(table(rows))


if __name__ == "__main__":
    main()
