"""A budget of time against one of sparsity, at the same predicted time, with a profile that is *made up*.

    python -m benchmarks.time_budget --targets 0.5 0.6 0.7

For every target: a vector at that sparsity, from Fisher prices alone and after descents; its time is predicted, and
another vector is made in the same way at that *time*. Both are re-calibrated at their own points. What is compared is
the loss; the time is predicted by a synthetic profile, which shows what the search does with one, and says nothing
about any device. One JSON line a vector is appended to benchmarks/results/time_budget.jsonl.

The profile gives the demo checkpoint's launches what docs/kernels.md says that those of a Llama-2-7B's block take on
an H200 at 50, 60 and 75 %, continued in straight lines to 0 and to 100 %: so a weight of q, k and v costs 1.7 times
what one of gate and up does, as the demo's attention is narrower than a Llama's.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.problem import SEED_DESCENT, SEED_SEQUENCES, Engine, Problem, Setup, fisher_prices
from benchmarks.rows import commit
from was_search.budget import Target, budget_of
from was_search.descent import DescentOptions
from was_search.latency import LatencyProfile, LaunchCurve
from was_search.latency_fit import FUSED, launch_kinds
from was_search.pricing import DEFAULT_GRID
from was_search.seeds import fisher_seed
from was_search.shape import FloatArray, ModelShape
from was_search.time_budget import TimeBudget

RESULTS = Path(__file__).parent / "results" / "time_budget.jsonl"

MICROSECONDS = {
    (0, 1, 2): (16.8, 14.9, 11.2),
    (3,): (8.0, 6.9, 6.1),
    (4, 5): (28.0, 24.7, 18.0),
    (6,): (14.9, 13.0, 9.9),
}
"""By launch, at 50, 60 and 75 %: docs/kernels.md, launch by launch."""

REST_SECONDS = 3e-4
DESCENT = DescentOptions(rounds=24)
DESCENT_SEQUENCES = 24


def made_up_profile(shape: ModelShape) -> LatencyProfile:
    """See the module's docstring; the dense step is the runtime's with nothing skipped."""
    knots = np.array([0.0, 0.5, 0.6, 0.75, 1.0])
    curves = []
    for kind in launch_kinds(shape, FUSED):
        half, more, most = MICROSECONDS[kind.projections]
        at = np.array([half + 5 * (half - more), half, more, most, most - 25 / 15 * (more - most)])
        curves.append(LaunchCurve(kind.projections, kind.blocks, knots, 1e-6 * (at - at[-1])))
    left = 1e-6 * sum(MICROSECONDS[k.projections][2] * len(k.blocks) for k in launch_kinds(shape, FUSED))
    rest = REST_SECONDS + left - sum(len(c.blocks) * float(c.seconds[3]) for c in curves)
    whole = rest + sum(len(c.blocks) * float(c.seconds[0]) for c in curves)
    return LatencyProfile(
        shape=shape,
        curves=tuple(curves),
        rest_seconds=rest,
        dense={"the runtime, nothing skipped": whole},
        device="made up of an H200's launches",
        dtype="float16",
        backend="cuda, fused",
        rows=1,
        kv_length=256,
        source="synthetic",
    )


def vectors(
    engine: Engine, prices: FloatArray, dense: Any, target: Target, seed: int
) -> Iterator[tuple[str, FloatArray]]:
    """From prices alone, then after the seed's descent and one of a search."""
    found = fisher_seed(prices, DEFAULT_GRID, engine.shape, target).sparsities
    yield "prices", found
    for options, sequences in ((SEED_DESCENT, SEED_SEQUENCES), (DESCENT, DESCENT_SEQUENCES)):
        data = engine.data["slope"]
        protocol = data.protocol
        found = engine.worker.descend(
            data.tokens,
            dense,
            found,
            target,
            options,
            sequences,
            protocol.batch_size,
            protocol.dense_prefix,
            protocol.predicted_per_sequence,
            seed,
        )
    yield "descents", found


def measure(engine: Engine, targets: list[float], seed: int) -> Iterator[dict[str, Any]]:
    """Rows, the vector of a sparsity before the one of its time."""
    dense, _ = engine.run_pass(None)
    prices = fisher_prices(engine, dense)
    profile = made_up_profile(engine.shape)
    for target in targets:
        problem = Problem(target, engine.shape, [], dense.to_bytes())
        for stage, vector in vectors(engine, prices, dense, target, seed):
            yield _row(engine, problem, profile, stage, "sparsity", target, vector)
            budget = TimeBudget(profile, profile.speedup(profile.seconds(vector)))
            at_time = next(v for name, v in vectors(engine, prices, dense, budget, seed) if name == stage)
            yield _row(engine, problem, profile, stage, "time", budget, at_time)


def _row(
    engine: Engine, problem: Problem, profile: LatencyProfile, stage: str, kind: str, target: Target, vector: FloatArray
) -> dict[str, Any]:
    seconds = profile.seconds(vector)
    return {
        "model": "demo",
        "target": problem.target,
        "stage": stage,
        "budget": kind,
        "budget_identity": budget_of(target, engine.shape).identity,
        "sparsity": engine.shape.sparsity(vector),
        "predicted_ms": 1e3 * seconds,
        "predicted_speedup": profile.speedup(seconds),
        **engine.confirm(problem, vector),
        "profile": "synthetic",
        "setup": engine.setup.identity(),
        "device": engine.info.device,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.6, 0.7])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    engine = Engine(Setup(device="cpu"))
    with options.output.open("a", encoding="utf-8") as file:
        for row in measure(engine, options.targets, options.seed):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{row['target']:.2f} {row['stage']:9s} {row['budget']:9s} sparsity {row['sparsity']:.4f} "
                f"{row['predicted_ms']:.4f} ms x{row['predicted_speedup']:.3f}  search {row['search_nats']:.4f} "
                f"test {row['test_nats']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
