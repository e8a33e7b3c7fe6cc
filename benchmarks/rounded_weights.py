"""Measure perplexity of rounded weights under masks on the demo checkpoint: formats, groups, and plans that move.

For each format: the dense model, the uniform vector and the seed made on the weights as stored, with its thresholds as
they were and re-calibrated, and a seed made on the rounded weights themselves. Rows are appended to
``benchmarks/results/rounded_weights.jsonl``; ``python -m benchmarks.rounded_weights`` repeats them on CPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.problem import Setup
from benchmarks.harness.rows import append_row
from was_search.checkpoints.rounding import round_groups
from was_search.checkpoints.structure import Structure
from was_search.coordinator.calls import Held
from was_search.coordinator.model_calls import Descend, EvaluateThresholds, Price
from was_search.masks.calibration import histogram_pass, operating_point
from was_search.masks.histogram import Histograms
from was_search.masks.masked_model import structure_norms
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import N_PROJECTIONS, FloatArray
from was_search.texts.protocol import perplexity
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.seeds import SEED_DESCENT, SEED_SEQUENCES, fisher_seed, point_seed
from was_search.weight_format import AS_STORED, WeightFormat
from was_workers.worker import Worker, WorkerSpec

RESULTS = Path(__file__).parent / "results" / "rounded_weights.jsonl"
INPUTS = "/in"
"""Suffix of a format whose groups lie along the inputs of an output, as GPTQ's and AWQ's; only here, in float."""


class Rounded:
    """The demo's model in one format, and what is measured of it."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.data = setup.tokens()
        form = name.removesuffix(INPUTS)
        along_inputs = name.endswith(INPUTS)
        held = AS_STORED if along_inputs else form
        self.worker = Worker(
            WorkerSpec(setup.model, "", setup.dtype, setup.device, setup.score, threads=1, weights=held)
        )
        model = self.worker.model
        if along_inputs:
            parsed = WeightFormat.parse(form)
            assert parsed is not None
            round_along_inputs(model.structure, parsed)
            model.norms[:] = structure_norms(model.structure, setup.score)
        self.model, self.shape, self.setup = model, model.shape, setup

    def run_pass(self, thresholds: npt.NDArray[np.float32] | None) -> tuple[Histograms, FloatArray]:
        histograms, seen, dropped = histogram_pass(self.model, self.data["calibration"], thresholds)
        return histograms, dropped / seen

    def seed(self, dense: Histograms, target: float) -> FloatArray:
        """The Fisher seed with its descent, as ``was-search seed`` makes it."""
        grid = [np.full((self.shape.n_blocks, N_PROJECTIONS), level) for level in DEFAULT_GRID]
        levels = np.stack([dense.thresholds(point) for point in grid], axis=-1)
        sums, n = self.worker.run(Price(self.data["calibration"].part(slice(self.setup.pricing_sequences)), levels))
        budget = SparsityBudget(self.shape, target)
        start = fisher_seed(np.asarray(sums / n, np.float64), DEFAULT_GRID, budget).sparsities
        call = Descend(Held(self.data["slope"]), Held(dense), start, budget, SEED_DESCENT, SEED_SEQUENCES, 0)
        end = self.worker.run(call)
        return point_seed("fisher", end, self.shape).sparsities

    def recalibrated(self, dense: Histograms, sparsities: FloatArray) -> npt.NDArray[np.float32]:
        return operating_point(self.run_pass, dense, sparsities, self.shape)[1]

    def measure(self, thresholds: npt.NDArray[np.float32] | None) -> dict[str, Any]:
        found = self.worker.run(EvaluateThresholds(self.data["test"], thresholds))
        return {
            "test_nats": found.loss_nats,
            "test_perplexity": perplexity(found.loss_nats),
            "standard_error_nats": float(found.losses.std(ddof=1) / len(found.losses) ** 0.5),
            "achieved": self.shape.sparsity(found.achieved),
        }


def round_along_inputs(structure: Structure, form: WeightFormat) -> None:
    """Replace the weights, in float, by what groups along the inputs of each output would hold."""
    for _, _, linear in structure.linears():
        weight = linear.weight.data
        parts = []
        for piece in weight.split(form.group, dim=1):
            q, scale, offset = round_groups(piece.float(), form.bits)
            parts.append(torch.addcmul(offset.float()[:, None], q.float(), scale.float()[:, None]))
        weight.copy_(torch.cat(parts, dim=1))


def measure_format(
    setup: Setup, name: str, targets: list[float], stored: dict[float, tuple[FloatArray, npt.NDArray[np.float32]]]
) -> None:
    """Append the rows of one format; the first, as stored, fills ``stored`` with its seeds and their thresholds."""
    started = time.perf_counter()
    model = Rounded(setup, name)
    about = {
        "weights": name,
        "protocol": model.data["test"].protocol.to_json(),
        **conditions(setup.device),
    }

    def add(vector: str, target: float, thresholds: npt.NDArray[np.float32] | None) -> None:
        row = {"vector": vector, "target": target, **model.measure(thresholds), **about}
        append_row(RESULTS, row)
        print(name, vector, target, f"{row['test_nats']:.4f} {row['achieved']:.4f}", flush=True)

    add("dense", 0.0, None)
    dense, _ = model.run_pass(None)
    for target in targets:
        uniform = np.full(model.shape.params.shape, target)
        add("uniform", target, model.recalibrated(dense, uniform))
        if name != AS_STORED and target in stored:
            sparsities, thresholds = stored[target]
            add("stored weights' seed, its thresholds", target, thresholds)
            add("stored weights' seed, re-calibrated", target, model.recalibrated(dense, sparsities))
        if not name.endswith(INPUTS):
            sparsities = model.seed(dense, target)
            thresholds = model.recalibrated(dense, sparsities)
            if name == AS_STORED:
                stored[target] = sparsities, thresholds
            add("seed", target, thresholds)
    print(name, f"{time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=f"{AS_STORED},int8:128,int4:128,int4:128{INPUTS},int4:64,int4:64{INPUTS}")
    parser.add_argument("--targets", default="0.5,0.6,0.7")
    options = parser.parse_args()
    setup, stored = Setup(device="cpu"), {}
    for name in options.weights.split(","):
        measure_format(setup, name, [float(target) for target in options.targets.split(",")], stored)


if __name__ == "__main__":
    main()
