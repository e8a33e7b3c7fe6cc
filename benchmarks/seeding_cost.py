"""Measure what seeding costs: time and peak memory of each step on one worker, without Ray or Postgres.

    python -m benchmarks.seeding_cost --model FOLDER --device cuda --dtype bfloat16

Every step is timed on a few sequences and scaled to the settings' numbers, which is exact but for what a call costs
once: all steps are linear in sequences. Tokens are random; neither time nor memory depends on them. Appends one
JSON row to ``benchmarks/results/seeding_cost.jsonl`` and prints it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row
from was_search.coordinator.calls import Held
from was_search.coordinator.model_calls import Calibrate, Descend, EvaluateThresholds, PeakBytes, Price
from was_search.masks.evaluation import sequence_nats
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import N_PROJECTIONS, IntArray
from was_search.texts.protocol import EvaluationProtocol, TokenSet
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions
from was_workers.worker import Worker, WorkerSpec

RESULTS = Path(__file__).resolve().parent / "results" / "seeding_cost.jsonl"

EVALUATED, CALIBRATED, PRICED, ROUNDS, PER_ROUND = 64, 64, 32, 8, 16
"""Sequences of an evaluation, of a calibration pass and of prices; rounds of the seed's descent and their sequences.

They are the defaults of ``was_search.service.settings`` and ``was_search.vectors.seeds``.
"""


def measure(worker: Worker, tokens: IntArray, batch_size: int, target: float) -> dict[str, Any]:
    """Seconds of each step at the settings' numbers, and peak bytes; ``tokens`` [n, sequence_length] are timed."""
    model = worker.model
    shape, n = model.shape, len(tokens)
    uniform = np.full((shape.n_blocks, N_PROJECTIONS), target)
    predicted = tokens.shape[1] - 1
    protocol = EvaluationProtocol(
        data="random", data_hash="", split="search", sequence_length=tokens.shape[1], stride=tokens.shape[1],
        n_sequences=n, bos=False, dtype=worker._spec.dtype, batch_size=batch_size, dense_prefix=1, tokens_hash="",
    )  # fmt: skip
    data = TokenSet.of(protocol, tokens)
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def step(name: str, work: Callable[[], Any], scale: float, repeats: int = 2) -> Any:
        """Time ``work``: the fastest of the repeats after a first one that warms up."""
        found = work()
        taken = []
        for _ in range(repeats):
            worker.run(PeakBytes())
            _synchronise(worker)
            started = time.perf_counter()
            found = work()
            _synchronise(worker)
            taken.append(time.perf_counter() - started)
        seconds[name], peaks[name] = scale * min(taken), worker.run(PeakBytes())
        return found

    dense, _, _ = step("calibration pass", lambda: worker.run(Calibrate(Held(data), None)), CALIBRATED / n)
    levels = np.stack([dense.thresholds(np.full_like(uniform, level)) for level in DEFAULT_GRID], axis=-1)
    thresholds = dense.thresholds(uniform)
    step("dense forward", lambda: worker.run(EvaluateThresholds(data, None)), EVALUATED / n)
    step("evaluation", lambda: worker.run(EvaluateThresholds(data, thresholds)), EVALUATED / n)
    step("prices", lambda: worker.run(Price(data, levels)), PRICED / n)
    options, budget = DescentOptions(rounds=1), SparsityBudget(shape, target)
    step(
        "descent",
        lambda: worker.run(Descend(Held(data), Held(dense), uniform, budget, options, n, 0)),
        ROUNDS * PER_ROUND / n,
    )
    step("forward and backward of one batch", lambda: _backward(model.model, tokens[:batch_size], predicted), 1.0)
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_gib": {name: round(value / 2**30, 3) for name, value in peaks.items()},
        "seeding_in_evaluations": round((seconds["prices"] + seconds["descent"]) / seconds["evaluation"], 2),
    }


def _synchronise(worker: Worker) -> None:
    if worker._spec.device == "cuda":
        torch.cuda.synchronize()


def _backward(model: Any, tokens: IntArray, predicted: int) -> None:
    """A dense forward and backward to the embeddings' output, weights frozen, to compare seeding's memory with."""
    batch = torch.as_tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)
    starts: list[torch.Tensor] = []

    def start(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        starts[:] = [out.detach().requires_grad_(True)]
        return starts[0]

    handle = model.get_input_embeddings().register_forward_hook(start)
    try:
        with torch.enable_grad():
            torch.autograd.grad(sequence_nats(model, batch, predicted).sum(), starts)
    finally:
        handle.remove()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8, help="timed; whole batches")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.sequences % options.batch_size:
        parser.error(f"--sequences: must be whole batches of {options.batch_size}, got {options.sequences}")
    worker = Worker(WorkerSpec(options.model, "", options.dtype, options.device, "l2"))
    info = worker.prepare()
    vocabulary = worker.model.model.config.vocab_size
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, (options.sequences, options.sequence_length))
    row = {
        "model": Path(options.model).name,
        "blocks": info.shape.n_blocks,
        "projection_weights": int(info.shape.params.sum()),
        **{name: getattr(options, name) for name in ("dtype", "sequence_length", "batch_size", "sequences", "target")},
        **measure(worker, tokens, options.batch_size, options.target),
        **conditions(info.device),
    }
    append_row(options.output, row)
    for name, value in row["seconds"].items():
        print(f"{name:36s} {value:9.2f} s  {row['peak_gib'][name]:7.2f} GiB")
    print(f"seeding costs {row['seeding_in_evaluations']} full evaluations")


if __name__ == "__main__":
    main()
