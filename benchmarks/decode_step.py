"""Time one decoding step of a whole model: dense beside plans of several sparsities, in one run on one GPU.

    python -m benchmarks.decode_step --model llama-2-7b --sparsities 0 0.5 0.6 0.75 --compile
    python -m benchmarks.decode_step --model was_search/demo_data/model --dtype bf16
    python -m benchmarks.decode_step --weights int4
    python -m benchmarks.decode_step --batches 4 8 16 --sparsities 0.5 --compile
    python -m benchmarks.decode_step --compensation

A model is a shape of ``scripts/make_random_model.py`` (random weights) or a folder. The step is what ``sparsify``
leaves a user with: one token for each row through a ``LlamaForCausalLM`` with a static cache, head included, replayed
from a CUDA graph; every replay gets other tokens. Masks are made inside. Thresholds are the quantiles that a pass
over random tokens meets, each projection's under the masks of those before it; the sparsity that is reported was
counted in decoding steps. The limit is the time to read the weights that must be read, the head and the cache at the
bandwidth measured first. With ``--compensation`` each plan's step is also timed with scales of 1 and constants of 0,
which leave the masks alone: two graphs of one model in turn, so that their ratio does not depend on when each was
timed. One JSON line a row is appended to benchmarks/results/decode_step.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.random_models import DTYPES, build, compensated, plan_at
from benchmarks.harness.rows import append_row
from scripts.make_random_model import SHAPES
from was_kernels.runtime.sparse_model import SparseModel, sparsify
from was_kernels.timing.step import DecodeStep, Times, other_bytes, projection_bytes, read_bandwidth
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import resolve_model
from was_search.checkpoints.quantised import quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.shape import MASKS
from was_search.weight_format import AS_STORED, WeightFormat, canonical

ROUNDS = 9
"""How often a compensated step and the same without are timed in turn."""

RESULTS = Path(__file__).parent / "results" / "decode_step.jsonl"


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, sizes in bytes."""

    model: str
    dtype: str
    weights: str
    batch: int
    kv_length: int
    path: str
    masks: str
    nominal_sparsity: float
    sparsity: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    limit_ms: float
    limit_share: float
    tokens_per_s: float
    read_bytes: int
    speedup_over_eager: float | None
    speedup_over_compiled: float | None
    fused_blocks: int
    read_tb_per_s: float
    over_uncompensated: float | None


@dataclass(frozen=True)
class Case:
    """A step to be timed; the model runs the plan while it is at hand. ``without`` is timed in turn with it."""

    path: str
    nominal_sparsity: float
    sparsity: float
    weight_bytes: int
    fused_blocks: int
    step: DecodeStep
    without: DecodeStep | None = None

    def times(self, replays: int) -> tuple[Times, float | None]:
        """The step's percentiles and, where another step is timed in turn, how many times as long as that it takes."""
        first = self.step.times(replays)
        if self.without is None:
            return first, None
        turns = [[step.times(replays, again=True) for step in (self.step, self.without)] for _ in range(ROUNDS)]
        own = [mine for mine, _ in turns]
        found = Times(*(median(getattr(one, name) for one in own) for name in ("p20", "p50", "p80")))
        return found, median(mine.p50 / other.p50 for mine, other in turns)


@contextmanager
def uncorrected(handle: SparseModel) -> Iterator[None]:
    """The plan without its compensation; what is captured inside stays without. Not of a CPU's steps, which hold it."""
    held = [(projection, projection.scale, projection.constant) for projection in handle.projections]
    for projection, _, _ in held:
        projection.scale = projection.constant = None
    try:
        yield
    finally:
        for projection, scale, constant in held:
            projection.scale, projection.constant = scale, constant


def cases(model: Any, batch: int, options: argparse.Namespace) -> Iterator[Case]:
    """Dense steps with the weights as they are, then each plan's, with rounded weights if these are asked for."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, 2 * options.kv_length), device=model.device)
    every = projection_bytes([linear for _, _, linear in find_structure(model).linears()])
    yield Case("dense", 0.0, 0.0, every, 0, DecodeStep(model, tokens, options.kv_length))
    if options.compile:
        step = DecodeStep(model, tokens, options.kv_length, compiled=True)
        yield Case("dense, torch.compile", 0.0, 0.0, every, 0, step)
    if (form := WeightFormat.parse(options.weights)) is not None:
        quantise_projections(find_structure(model), form)
    for sparsity in options.sparsities:
        plan = plan_at(model, sparsity, options.masks)
        handle = sparsify(model, compensated(plan, 0.0) if options.compensation else plan, backend=options.backend)
        with uncorrected(handle):
            step = DecodeStep(model, tokens, options.kv_length)
            counted = step.counted(handle)
            case = Case(handle.backend, sparsity, counted.sparsity, counted.weight_bytes, handle.fused, step)
            yield case
            if options.compile_plans:
                compiled = DecodeStep(model, tokens, options.kv_length, compiled=True)
                yield replace(case, path=f"{handle.backend}, torch.compile", step=compiled)
        if options.compensation:
            own = DecodeStep(model, tokens, options.kv_length)
            counted = own.counted(handle)
            sparse = {"sparsity": counted.sparsity, "weight_bytes": counted.weight_bytes}
            yield replace(case, path=f"{handle.backend}, compensated", step=own, without=step, **sparse)
        handle.restore()


def measure(model: Any, batch: int, bandwidth: float, options: argparse.Namespace) -> Iterator[Row]:
    """Rows as they are measured, each compared with the dense ones before it; ``bandwidth`` in bytes a second."""
    others = other_bytes(model, batch, options.kv_length)
    dense: dict[str, float] = {}
    for case in cases(model, batch, options):
        times, over_uncompensated = case.times(options.replays)
        if case.path.startswith("dense"):
            dense[case.path] = times.p50
        read = case.weight_bytes + others
        limit_ms = 1e3 * read / bandwidth
        over = {name: dense[name] / times.p50 if name in dense else None for name in ("dense", "dense, torch.compile")}
        yield Row(
            model=options.model if options.model in SHAPES else fingerprint(resolve_model(options.model))[:12],
            dtype=options.dtype,
            weights=AS_STORED if case.path.startswith("dense") else canonical(options.weights),
            batch=batch,
            kv_length=options.kv_length,
            path=case.path,
            masks="" if case.path.startswith("dense") else options.masks,
            nominal_sparsity=case.nominal_sparsity,
            sparsity=case.sparsity,
            p20_ms=times.p20,
            p50_ms=times.p50,
            p80_ms=times.p80,
            limit_ms=limit_ms,
            limit_share=limit_ms / times.p50,
            tokens_per_s=1e3 * batch / times.p50,
            read_bytes=read,
            speedup_over_eager=over["dense"],
            speedup_over_compiled=over["dense, torch.compile"],
            fused_blocks=case.fused_blocks,
            read_tb_per_s=bandwidth / 1e12,
            over_uncompensated=over_uncompensated,
        )


def line(row: Row) -> str:
    """A row as a line of text."""
    over = "" if row.speedup_over_compiled is None else f", x{row.speedup_over_compiled:.2f} over compiled"
    if row.over_uncompensated is not None:
        over += f", {row.over_uncompensated:.4f} times as long as without"
    return (
        f"{row.batch:2d} {row.path:22s} {row.nominal_sparsity:.2f} counted {row.sparsity:.3f}  {row.p50_ms:.3f} ms "
        f"({row.p20_ms:.3f} to {row.p80_ms:.3f})  limit {row.limit_ms:.3f} ms, {row.limit_share:.0%}  "
        f"x{row.speedup_over_eager or 1.0:.2f} over eager{over}, {row.tokens_per_s:.0f} tokens/s"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--weights", type=canonical, default=AS_STORED, help="of the plans: none, int8, int4, int4:64")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.5, 0.6, 0.75])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--kv-length", type=int, default=256)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--backend", choices=("auto", "cuda", "triton", "reference"), default="auto")
    parser.add_argument("--masks", choices=MASKS, default="separate")
    parser.add_argument("--compile", action="store_true", help="time torch.compile's dense step too")
    parser.add_argument("--compile-plans", action="store_true", help="time torch.compile's sparse steps too")
    parser.add_argument("--compensation", action="store_true", help="time plans with a compensation too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.weights != AS_STORED and len(options.batches) > 1:
        parser.error("--batches: one with --weights, whose rounding takes the dense model's place")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    model = build(options.model, DTYPES[options.dtype])
    bandwidth = read_bandwidth(torch.device("cuda"))
    for batch in options.batches:
        for row in measure(model, batch, bandwidth, options):
            append_row(options.output, asdict(row) | conditions())
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
