"""Measure what shared masks cost in loss: seeds with separate and with shared masks at the same counted sparsity.

    python -m benchmarks.mask_sharing --targets 0.5 0.6 0.7 0.8 --descend

For each target and kind of masks the seed is made as a study makes it (dense histograms, Fisher prices, a short
descent), with ``--descend`` a search's descent goes on from there, thresholds are re-taken at the point until nominal
sparsities are achieved, and the vector is evaluated on the test split. Differences are paired over its sequences,
with a 95 % interval. CPU or GPU, one process, no Ray. One JSON line a row is appended to
benchmarks/results/mask_sharing.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row
from was_search.checkpoints.load import load_tokenizer, pick_device, resolve_model
from was_search.coordinator.calls import Held
from was_search.coordinator.model_calls import Calibrate, Descend, EvaluateThresholds, Price
from was_search.masks.calibration import operating_point
from was_search.masks.histogram import Histograms
from was_search.masks.intervals import paired_interval
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import MASKS, FloatArray, Masks
from was_search.texts.protocol import Evaluation, TokenSet
from was_search.texts.splits import load_text
from was_search.texts.tokens import tokenise
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions
from was_search.vectors.seeds import SEED_DESCENT, SEED_SEQUENCES, fisher_seed
from was_workers.worker import Worker, WorkerSpec

RESULTS = Path(__file__).parent / "results" / "mask_sharing.jsonl"
DEMO = Path(__file__).resolve().parents[1] / "was_search" / "demo_data"
SEARCH_DESCENT, SEARCH_SEQUENCES = DescentOptions(rounds=16), 24


class Side:
    """One kind of masks: a worker with the model, and what is made of the dense model once."""

    def __init__(self, options: argparse.Namespace, masks: Masks, data: dict[str, TokenSet]) -> None:
        device = pick_device(options.device)
        self.worker = Worker(WorkerSpec(options.model, "", "float32", device, "l2", masks=masks))
        self.shape = self.worker.prepare().shape
        self.data = data
        self.dense, _ = self._pass(None)
        grid = [np.full((self.shape.n_blocks, 7), level) for level in DEFAULT_GRID]
        levels = np.stack([self.dense.thresholds(point) for point in grid], axis=-1)
        sums, n = self.worker.run(Price(data["calibration"].part(slice(options.pricing_sequences)), levels))
        self.prices = sums / n

    def _pass(self, thresholds: Any) -> tuple[Histograms, FloatArray]:
        call = Calibrate(Held(self.data["calibration"]), thresholds)
        histograms, seen, dropped = self.worker.run(call)
        return histograms, dropped / np.maximum(seen, 1)

    def descend(self, start: FloatArray, target: float, options: DescentOptions, per_round: int) -> FloatArray:
        data, budget = Held(self.data["slope"]), SparsityBudget(self.shape, target)
        return self.worker.run(Descend(data, Held(self.dense), start, budget, options, per_round, 0))

    def vectors(self, target: float, descend: bool) -> dict[str, FloatArray]:
        """The seed [L, 7] and, if asked for, the end of a search's descent from it."""
        priced = fisher_seed(self.prices, DEFAULT_GRID, SparsityBudget(self.shape, target)).sparsities
        found = {"seed": self.descend(priced, target, SEED_DESCENT, SEED_SEQUENCES)}
        if descend:
            found["descended"] = self.descend(found["seed"], target, SEARCH_DESCENT, SEARCH_SEQUENCES)
        return found

    def evaluate(self, sparsities: FloatArray) -> tuple[Evaluation, float]:
        """Evaluation on the test split at the vector's own operating point, and the achieved sparsity there."""
        _, thresholds, _, _ = operating_point(self._pass, self.dense, sparsities, self.shape)
        found = self.worker.run(EvaluateThresholds(self.data["test"], thresholds))
        return found, self.shape.sparsity(found.achieved)


def measure(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(resolve_model(options.model))
    counts = {
        "calibration": ("calibration", options.calibration_sequences),
        "slope": ("calibration", 512),
        "test": ("test", options.test_sequences),
    }
    data = {
        name: tokenise(
            load_text(options.data, split),
            tokenizer,
            sequence_length=options.sequence_length,
            n_sequences=n,
            at_most=True,
            dtype="float32",
            batch_size=8,
            dense_prefix=1,
            seed=0,
        )
        for name, (split, n) in counts.items()
    }
    sides = {masks: Side(options, masks, data) for masks in MASKS}
    dense = sides["separate"].worker.run(EvaluateThresholds(data["test"], None))
    for target in options.targets:
        vectors = {masks: side.vectors(target, options.descend) for masks, side in sides.items()}
        for point in vectors["separate"]:
            separate, achieved = sides["separate"].evaluate(vectors["separate"][point])
            shared, shared_achieved = sides["shared"].evaluate(vectors["shared"][point])
            gap = paired_interval(shared.losses, separate.losses)
            row = {
                "target": target,
                "point": point,
                "dense_nats": dense.loss_nats,
                "separate_nats": separate.loss_nats,
                "shared_nats": shared.loss_nats,
                "shared_less_separate_nats": asdict(gap),
                "separate_achieved": achieved,
                "shared_achieved": shared_achieved,
                "seconds": {"dense": dense.seconds, "separate": separate.seconds, "shared": shared.seconds},
                "calibration_sequences": options.calibration_sequences,
                "pricing_sequences": options.pricing_sequences,
                "protocol": data["test"].protocol.to_json(),
                **conditions(),
            }
            append_row(options.output, row)
            print(
                f"{target:.2f} {point:9s} separate {separate.loss_nats:.4f} ({achieved:.4f})  "
                f"shared {shared.loss_nats:.4f} ({shared_achieved:.4f})  difference {gap}",
                flush=True,
            )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"))
    parser.add_argument("--data", default=str(DEMO / "text"))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--descend", action="store_true", help="go on from the seed as a search's descent does")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--calibration-sequences", type=int, default=96)
    parser.add_argument("--pricing-sequences", type=int, default=32)
    parser.add_argument("--test-sequences", type=int, default=192)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    measure(parse())
