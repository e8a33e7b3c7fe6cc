"""What all methods share at one target, and the model that evaluates and confirms their vectors.

Tables, seeds and thresholds are made once, by the same steps as ``was_search.api`` makes them, here without Ray and
Postgres: in one process, on one device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.fast_evaluator import FastEvaluator
from was_search.calibration import operating_point
from was_search.descent import DescentOptions
from was_search.errors import ConfigError
from was_search.fingerprint import fingerprint
from was_search.histogram import Histograms
from was_search.model import load_tokenizer, pick_device, pick_dtype, resolve_model
from was_search.pricing import DEFAULT_GRID
from was_search.protocol import SPLITS, TokenSet, perplexity
from was_search.score import SCORE_KINDS, ScoreKind
from was_search.seeds import Seed, baseline_seeds, fisher_seed, point_seed
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray, ModelShape
from was_search.table import Table
from was_search.text import load_text
from was_search.tokens import tokenise
from was_workers.worker import Worker, WorkerSpec

DEMO = Path(__file__).resolve().parents[1] / "was_search" / "demo_data"

GREEDY_STEP = 0.0125
SEED_DESCENT = DescentOptions(rounds=8, step=0.04, momentum=0.5, average=0.4)
SEED_SEQUENCES = 16
"""Those of ``was_search.api.seed``, which needs more packages than a GPU machine may have."""


@dataclass(frozen=True)
class Setup:
    """Model, data and what seeds are made of. The defaults are the demo's."""

    model: str = str(DEMO / "model")
    data: str = str(DEMO / "text")
    device: str = "auto"
    dtype: str = "float32"
    tf32: bool = False
    score: ScoreKind = "l2"
    sequence_length: int = 256
    batch_size: int = 0
    dense_prefix: int = 1
    calibration_sequences: int = 96
    pricing_sequences: int = 32
    slope_sequences: int = 512
    greedy_sequences: int = 4
    search_sequences: int = 64
    test_sequences: int = 192
    order_seed: int = 0

    def __post_init__(self) -> None:
        counts = ("calibration", "pricing", "slope", "greedy", "search", "test")
        for name in (*(f"{name}_sequences" for name in counts), "sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("batch_size", "dense_prefix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.score not in SCORE_KINDS:
            raise ConfigError(f"score: must be one of {', '.join(SCORE_KINDS)}, got {self.score!r}")
        object.__setattr__(self, "device", pick_device(self.device))
        object.__setattr__(self, "dtype", pick_dtype(self.dtype, self.device))
        if self.batch_size == 0:
            object.__setattr__(self, "batch_size", 64 if self.device.startswith("cuda") else 8)

    def identity(self) -> dict[str, Any]:
        """What decides results, without places: the model and the data count by their hashes."""
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "data", "device")}
        return {**own, "seed_descent": {**asdict(SEED_DESCENT), "sequences": SEED_SEQUENCES}}

    def tokens(self) -> dict[str, TokenSet]:
        """The three splits, and ``slope``: more of the calibration split."""
        tokenizer = load_tokenizer(self.model)
        return {
            name: tokenise(
                load_text(self.data, split),
                tokenizer,
                sequence_length=self.sequence_length,
                n_sequences=getattr(self, f"{name}_sequences"),
                at_most=True,
                dtype=self.dtype,
                batch_size=self.batch_size,
                dense_prefix=self.dense_prefix,
                seed=self.order_seed,
            )
            for name, split in (*((split, split) for split in SPLITS), ("slope", "calibration"))
        }

    def fingerprint(self) -> str:
        return fingerprint(resolve_model(self.model))


@dataclass(frozen=True)
class Problem:
    """One target: the seeds, and the histograms that all evaluations take their thresholds from.

    ``histograms`` are packed by :meth:`Histograms.to_bytes`: a few hundred kB where the counts are tens of MB, and
    every process gets those of all targets.
    """

    target: float
    shape: ModelShape
    seeds: list[Seed]
    histograms: bytes


@dataclass
class Engine:
    """One process's model, its fast evaluator on the search split, and the report of a vector."""

    setup: Setup
    data: dict[str, TokenSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.setup.tf32
        self.data = self.data or self.setup.tokens()
        spec = WorkerSpec(self.setup.model, "", self.setup.dtype, self.setup.device, self.setup.score, threads=1)
        self.worker = Worker(spec)
        self.info = self.worker.prepare()
        self.loaded = self.worker._model()
        self.fast = FastEvaluator(self.loaded.model, self.loaded.structure, self.loaded.norms, self.data["search"])
        self._histograms: tuple[float, Histograms] | None = None
        self._confirmed: dict[tuple[float, bytes], dict[str, Any]] = {}

    @property
    def shape(self) -> ModelShape:
        return self.info.shape

    def run_pass(self, thresholds: npt.NDArray[np.float32] | None) -> tuple[Histograms, FloatArray]:
        """A pass over the calibration split: histograms, and achieved sparsities [L, 7]."""
        data = self.data["calibration"]
        found, seen, dropped = self.worker.histograms(
            data.tokens, thresholds, data.protocol.batch_size, data.protocol.dense_prefix
        )
        return found, dropped / np.maximum(seen, 1)

    def descend(
        self,
        histograms: Histograms,
        start: FloatArray,
        target: float,
        options: DescentOptions,
        per_round: int,
        seed: int,
    ) -> FloatArray:
        """One descent as a worker of a search runs it."""
        data = self.data["slope"]
        return self.worker.descend(
            data.tokens,
            histograms,
            start,
            target,
            options,
            per_round,
            data.protocol.batch_size,
            data.protocol.dense_prefix,
            data.protocol.predicted_per_sequence,
            seed,
        )

    def histograms_of(self, problem: Problem) -> Histograms:
        """The problem's histograms, unpacked once for runs of the same target."""
        if self._histograms is None or self._histograms[0] != problem.target:
            found = Histograms.from_bytes(problem.histograms, problem.shape.n_blocks)
            self._histograms = (problem.target, found)
        return self._histograms[1]

    def losses(self, problem: Problem, sparsities: FloatArray, sequences: IntArray) -> FloatArray:
        """Losses on the search split under the problem's shared thresholds: what a ledger evaluates with."""
        return self.fast.losses(self.histograms_of(problem).thresholds(sparsities), sequences)

    def confirm(self, problem: Problem, sparsities: FloatArray) -> dict[str, Any]:
        """Thresholds re-taken at the vector's own operating point, and its losses there on the search and test split.

        By the reference evaluator, which also counts the sparsity achieved on each split.
        """
        key = (problem.target, sparsities.tobytes())
        if key not in self._confirmed:
            # The shared point is near, so fewer passes are needed than from the dense model.
            _, thresholds, achieved, passes = operating_point(
                self.run_pass, self.histograms_of(problem), sparsities, problem.shape
            )
            row: dict[str, Any] = {"achieved": {"calibration": problem.shape.sparsity(achieved)}, "passes": passes}
            for split in ("search", "test"):
                found = self.worker.evaluate_thresholds(self.data[split], thresholds)
                row[f"{split}_nats"] = found.loss_nats
                row["achieved"][split] = problem.shape.sparsity(found.achieved)
            row["test_perplexity"] = perplexity(row["test_nats"])
            self._confirmed[key] = row
        return dict(self._confirmed[key])


def prepare(engine: Engine, targets: list[float]) -> list[Problem]:
    """Seeds and shared thresholds at each target, as ``was_search.api`` makes them."""
    setup, shape = engine.setup, engine.shape
    tokens = engine.data["calibration"].tokens
    dense, _ = engine.run_pass(None)
    protocol = engine.data["calibration"].protocol
    blocks = [
        engine.worker.block_table(
            b, tokens[: setup.greedy_sequences], dense, protocol.batch_size, protocol.dense_prefix, GREEDY_STEP
        )
        for b in range(shape.n_blocks)
    ]
    greedy = Table("greedy", tuple(blocks))
    dense_prices = _prices(engine, dense)
    problems = []
    for target in targets:
        fisher = fisher_seed(dense_prices, DEFAULT_GRID, shape, target)
        end = engine.descend(dense, fisher.sparsities, target, SEED_DESCENT, SEED_SEQUENCES, setup.order_seed)
        fisher = point_seed("fisher", end, shape)
        histograms, _, _, _ = operating_point(engine.run_pass, dense, fisher.sparsities, shape)
        seeds = [*baseline_seeds(shape, target, greedy), fisher]
        problems.append(Problem(target, shape, seeds, histograms.to_bytes()))
    return problems


def _prices(engine: Engine, histograms: Histograms) -> FloatArray:
    """Mean prices [L, 7, G] of the dense model in nats per token."""
    setup, protocol = engine.setup, engine.data["calibration"].protocol
    grid = [np.full((engine.shape.n_blocks, N_PROJECTIONS), level) for level in DEFAULT_GRID]
    levels = np.stack([histograms.thresholds(point) for point in grid], axis=-1)
    sums, n = engine.worker.prices(
        engine.data["calibration"].tokens[: setup.pricing_sequences],
        levels,
        protocol.batch_size,
        protocol.dense_prefix,
        protocol.predicted_per_sequence,
    )
    return np.asarray(sums / n, np.float64)
