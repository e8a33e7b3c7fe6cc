"""Profile a model's decoding step on a GPU and compare it with steps of unseen random vectors.

    python -m benchmarks.decode_profile --model llama-2-7b --vectors 20
    python -m benchmarks.decode_profile --model llama-3-8b --dtype bf16

A model is a shape of ``scripts/make_random_model.py`` (random weights) or a folder. The profile is made as
``was-search profile`` makes it, with fixed masks; the vectors are timed twice, with fixed masks and with masks by score
as plans have them, at the sparsity that is then counted. One JSON line is appended to
benchmarks/results/decode_profile.jsonl: the profile, how long it took, and every vector.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.random_models import DTYPES, build
from benchmarks.harness.rows import append_row
from scripts.make_random_model import SHAPES
from was_kernels.timing.profile import StepClock, typical_seconds
from was_kernels.timing.step import DecodeStep
from was_search.checkpoints.structure import find_structure
from was_search.decode_time.fit import FUSED, SINGLE, check, check_summary, fit, launch_kinds
from was_search.decode_time.profile import LatencyProfile

RESULTS = Path(__file__).parent / "results" / "decode_profile.jsonl"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row."""
    now = conditions()
    model = build(options.model, DTYPES[options.dtype])
    shape = find_structure(model).shape
    tokens = torch.randint(0, model.config.vocab_size, (options.rows, 2 * options.kv_length), device="cuda")
    dense = {"eager": typical_seconds(DecodeStep(model, tokens, options.kv_length).times(50), True)}
    if options.compile:
        step = DecodeStep(model, tokens, options.kv_length, compiled=True)
        dense["compiled"] = typical_seconds(step.times(50), True)
    with StepClock(model, tokens, options.kv_length, steps=options.steps) as clock:
        kinds = launch_kinds(shape, FUSED if clock.fused else SINGLE)
        clock(np.full(shape.params.shape, 0.5))
        started = time.perf_counter()
        found = fit(clock, shape, kinds, rounds=options.rounds)
        took = time.perf_counter() - started
        profile = LatencyProfile(
            shape=shape,
            curves=found.curves,
            rest_seconds=found.rest_seconds,
            dense=dense,
            device=now["device"],
            dtype=options.dtype,
            backend=clock.backend,
            rows=options.rows,
            kv_length=options.kv_length,
            versions=now["versions"],
            measured_at=now["when"],
            spread=found.spread,
        )
        by_mask = {
            "fixed": check(clock, profile, options.vectors, seed=2),
            "by score": check(clock.by_score, profile, options.vectors),
        }
    return {
        "model": options.model if options.model in SHAPES else Path(options.model).name,
        "seconds": took,
        "profile": profile.to_json(),
        "vectors": by_mask,
        "summary": {name: check_summary(rows) for name, rows in by_mask.items()},
        **now,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--kv-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vectors", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="time torch.compile's dense step too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    row = measure(options)
    append_row(options.output, row)
    print(f"{row['model']}: profiled in {row['seconds']:.1f} s, spread {100 * row['profile']['spread']:.2f} %")
    for name, summary in row["summary"].items():
        print(
            f"{summary['vectors']} vectors, masks {name}: error at most {100 * summary['max_error']:.2f} %, "
            f"{100 * summary['mean_error']:.2f} % in the mean"
        )


if __name__ == "__main__":
    main()
