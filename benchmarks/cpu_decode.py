"""Time ``model.generate`` on a CPU: dense beside plans of several sparsities, in one run by turns.

    python -m benchmarks.cpu_decode --model llama-1b --blocks 8 --dtype bf16
    python -m benchmarks.cpu_decode --model FOLDER --dtype fp32 --sparsities 0.5 --cache static
    python -m benchmarks.cpu_decode --model llama-1b --weights none int8 int4 --sparsities 0.0 0.5 0.75

A model is a shape of ``scripts/make_random_model.py`` (random weights) or a folder. Plans have one sparsity
everywhere, their thresholds are the quantiles that a pass over random tokens meets; what decoding skips is counted.
Dense is always the model with its weights as stored.
What is timed are the one-token steps of a user's call: a prompt of 64 random tokens, greedy, one row, all of
transformers' own work between steps included. Other processes only ever add time, so a row has the quickest step and
the median of the quickest round. One JSON line a row is appended to benchmarks/results/cpu_decode.jsonl.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.conditions import conditions
from benchmarks.harness.random_models import DTYPES, build, plan_at
from benchmarks.harness.rows import append_row
from scripts.make_random_model import SHAPES
from was_kernels.runtime.sparse_model import sparsify
from was_kernels.timing.generate import beside_each_other, token_times
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import resolve_model
from was_search.checkpoints.quantised import quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.plan import Plan
from was_search.weight_format import AS_STORED, WeightFormat

RESULTS = Path(__file__).parent / "results" / "cpu_decode.jsonl"
PROMPT = 64
CPU_DTYPES = {**DTYPES, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds."""

    model: str
    blocks: int
    dtype: str
    cache: str
    threads: int
    backend: str
    weights: str
    nominal_sparsity: float
    sparsity: float
    least_ms: float
    median_ms: float
    tokens_per_s: float
    speedup_least: float
    speedup_median: float


def measure(options: argparse.Namespace) -> list[Row]:
    """Rows of the dense model, and of each sparsity of each format of weights."""
    stored = build(options.model, CPU_DTYPES[options.dtype], device="cpu", blocks=options.blocks)
    stored.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(5, stored.config.vocab_size, (1, PROMPT), generator=generator)
    kinds: list[tuple[str, float | None]] = [(AS_STORED, None)]
    runs: list[tuple[Any, Plan | None]] = [(stored, None)]
    for weights in options.weights:
        model = in_format(stored, weights)
        kinds += [(weights, sparsity) for sparsity in options.sparsities]
        runs += [(model, plan_at(model, sparsity)) for sparsity in options.sparsities]
    cache = {} if options.cache == "dynamic" else {"cache_implementation": "static"}
    given = {"new_tokens": options.tokens, "rounds": options.rounds, "backend": options.backend}
    found = beside_each_other(runs, prompt, **given, **cache)
    name = options.model if options.model in SHAPES else fingerprint(resolve_model(options.model))[:12]
    return [
        Row(
            model=name,
            blocks=len(model.model.layers),
            dtype=options.dtype,
            cache=options.cache,
            threads=torch.get_num_threads(),
            backend="dense" if plan is None else options.backend,
            weights=weights,
            nominal_sparsity=sparsity or 0.0,
            sparsity=0.0 if plan is None else counted(model, plan, prompt, options.tokens),
            least_ms=1e3 * times.least,
            median_ms=1e3 * times.median,
            tokens_per_s=times.tokens_per_s,
            speedup_least=found[0].least / times.least,
            speedup_median=found[0].median / times.median,
        )
        for (weights, sparsity), (model, plan), times in zip(kinds, runs, found, strict=True)
    ]


def in_format(model: Any, weights: str) -> Any:
    """The model itself, or a copy whose projections are rounded."""
    form = WeightFormat.parse(weights)
    if form is None:
        return model
    copied = copy.deepcopy(model)
    quantise_projections(find_structure(copied), form)
    return copied


def counted(model: Any, plan: Plan, prompt: Tensor, new_tokens: int) -> float:
    """The sparsity of the steps of such a text, counted in a run of its own."""
    handle = sparsify(model, plan)
    try:
        with handle.counting() as counts:
            token_times(model, prompt, new_tokens)
        return counts.sparsity()
    finally:
        handle.restore()


def line(row: Row) -> str:
    """A row as a line of text."""
    name = row.backend if row.backend == "dense" else f"{row.sparsity:.1%} skipped, {row.backend}, {row.weights}"
    return (
        f"{row.model} {row.dtype} {row.cache:7s} {name:28s} {row.median_ms:8.2f} ms (least {row.least_ms:.2f})  "
        f"{row.tokens_per_s:6.1f} tokens/s  x{row.speedup_median:.2f} (least x{row.speedup_least:.2f})"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--blocks", type=int, help="of a shape: this many instead of its own")
    parser.add_argument("--dtype", choices=CPU_DTYPES, default="bf16")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.75])
    parser.add_argument("--weights", nargs="+", default=[AS_STORED], help="of the plans: none, int8, int4, int4:64 ...")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--backend", choices=("auto", "reference"), default="auto")
    parser.add_argument("--tokens", type=int, default=24, help="decoded in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for row in measure(options):
        append_row(options.output, asdict(row) | conditions("cpu"))
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
