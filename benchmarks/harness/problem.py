"""The problem that methods share at one target, and the engine that evaluates and confirms their vectors.

Tables, seeds and thresholds are made once, by the same steps as a run makes them, here without Ray and
Postgres: in one process, on one device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.cache import ArrayCache, Arrays
from benchmarks.harness.fast_evaluator import FastEvaluator
from benchmarks.harness.fast_passes import FastPasses
from benchmarks.harness.methods import KL_TOP_K
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_tokenizer, pick_device, pick_dtype, resolve_model
from was_search.compensation import Compensation
from was_search.coordinator.calls import Held
from was_search.coordinator.model_calls import Descend, GreedyBlock, LearnCompensation, Price
from was_search.errors import ConfigError
from was_search.masks.calibration import histogram_pass, operating_point
from was_search.masks.compensating import CompensationOptions, CompensationState
from was_search.masks.divergence import DenseTop
from was_search.masks.evaluation import dense_top, evaluate_thresholds
from was_search.masks.histogram import Histograms
from was_search.masks.pricing import DEFAULT_GRID
from was_search.shape import N_PROJECTIONS, SCORE_KINDS, FloatArray, IntArray, ModelShape, ScoreKind
from was_search.studies.fitness import FitnessName
from was_search.texts.protocol import SPLITS, TokenSet, perplexity
from was_search.texts.splits import load_text
from was_search.texts.tokens import text_order, tokenise
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.descent import DescentOptions
from was_search.vectors.seeds import (
    GREEDY_STEP,
    SEED_DESCENT,
    SEED_SEQUENCES,
    Seed,
    baseline_seeds,
    fisher_seed,
    point_seed,
)
from was_search.vectors.table import BlockTable, Table
from was_workers.worker import Worker, WorkerSpec

DEMO = Path(__file__).resolve().parents[2] / "was_search" / "demo_data"


@dataclass(frozen=True)
class Setup:
    """Model, data and the options of seeds; the defaults are the demo's.

    ``cache`` is a folder for greedy tables and the ends of descents; "" keeps none.
    """

    model: str = str(DEMO / "model")
    data: str = str(DEMO / "text")
    device: str = "auto"
    cache: str = ""
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
        """Everything that decides results; the model and the data count by their hashes, not by their paths."""
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "data", "device", "cache")}
        descent = asdict(SEED_DESCENT)
        if descent["width"] == 0.5:  # rows of before there was a choice have no word of it
            del descent["width"]
        return {**own, "seed_descent": {**descent, "sequences": SEED_SEQUENCES}}

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
        self.model = self.worker.model
        # One process's graphs share their memory, so that several processes fit on a GPU.
        self._pool = torch.cuda.graph_pool_handle() if self.model.device.type == "cuda" else None
        self.run_pass = FastPasses(self.model, self.data["calibration"], pool=self._pool)
        self.evaluators = {
            split: FastEvaluator(self.model, self.data[split], pool=self._pool) for split in ("search", "test")
        }
        self._divergence: FastEvaluator | None = None
        self._cache = ArrayCache(self.setup.cache)
        self._histograms: tuple[float, Histograms] | None = None
        self._confirmed: dict[tuple[float, bytes], dict[str, Any]] = {}

    @property
    def shape(self) -> ModelShape:
        return self.info.shape

    @property
    def graphs(self) -> bool:
        """Whether evaluations are replayed from CUDA graphs."""
        return self.evaluators["search"].graphs

    def dense(self) -> dict[str, float]:
        """Mean nats per token of the unmasked model on the search and the test split."""
        nothing = np.zeros((self.shape.n_blocks, N_PROJECTIONS), np.float32)
        found = {split: evaluator.losses(nothing) for split, evaluator in self.evaluators.items()}
        return {f"{split}_nats": float(losses.mean()) for split, losses in found.items()}

    def fitness(self, name: FitnessName) -> FastEvaluator:
        """The evaluator of losses on the search split; the dense model's top is made at the first use of ``kl``."""
        if name == "nll":
            return self.evaluators["search"]
        if self._divergence is None:
            data = self.data["search"]
            top = dense_top(self.model, data, KL_TOP_K)
            self._divergence = FastEvaluator(self.model, data, top=top, pool=self._pool)
        return self._divergence

    def block_table(self, block: int, dense: Histograms) -> BlockTable:
        """Greedy table of one block, from the cache if it is there."""
        data = self.data["calibration"].part(slice(self.setup.greedy_sequences))

        def make() -> Arrays:
            found = self.worker.run(GreedyBlock(block, Held(data), Held(dense), GREEDY_STEP))
            return {"levels": found.levels, "sparsities": found.sparsities}

        return BlockTable(
            **self._cache.get((*self._identity, "greedy", block, data.tokens, dense.counts, GREEDY_STEP), make)
        )

    @property
    def _identity(self) -> tuple[Any, ...]:
        return self.info.device, self.setup.fingerprint(), self.setup.identity()

    def descend(
        self,
        histograms: Histograms,
        start: FloatArray,
        target: float,
        options: DescentOptions,
        per_round: int,
        seed: int,
    ) -> FloatArray:
        """One descent as a worker of a search runs it, from the cache if it is there."""
        data = self.data["slope"]

        def make() -> Arrays:
            budget = SparsityBudget(self.shape, target)
            end = self.worker.run(Descend(Held(data), Held(histograms), start, budget, options, per_round, seed))
            return {"end": end}

        decides = (data.tokens, histograms.counts, start, target, asdict(options), per_round, seed)
        return self._cache.get((*self._identity, "descent", *decides), make)["end"]

    @cached_property
    def learning(self) -> tuple[TokenSet, DenseTop]:
        """What compensations are learned from, as a run divides its text, and the dense model's top of it."""
        return self.learnt_from(learning_text(self.data, self.setup.order_seed))

    def learnt_from(self, data: TokenSet) -> tuple[TokenSet, DenseTop]:
        """Text to learn compensations from, and the dense model's top of it."""
        return data, dense_top(self.model, data, KL_TOP_K)

    def compensate(
        self,
        problem: Problem,
        start: FloatArray,
        options: CompensationOptions,
        seed: int,
        learning: tuple[TokenSet, DenseTop] | None = None,
    ) -> tuple[FloatArray, Compensation, int]:
        """A compensation of the vector ``start``, as a run learns it: sparsities, vectors, and the tokens spent.

        It is learned from :attr:`learning` if nothing else is given.
        """
        data, top = learning or self.learning
        _, thresholds, _, _ = operating_point(self.run_pass, self.histograms_of(problem), start, problem.shape)
        budget = SparsityBudget(problem.shape, problem.target)
        call = LearnCompensation(
            Held(data),
            Held(top),
            CompensationState.start(problem.shape, start, thresholds),
            budget,
            options,
            seed,
            options.steps,
        )
        state = self.worker.run(call)
        tokens = round(call.tokens) + data.tokens.size
        return state.mean_sparsities(budget, options), state.compensation(problem.shape), tokens

    def confirm_compensated(
        self, problem: Problem, sparsities: FloatArray, compensation: Compensation
    ) -> dict[str, Any]:
        """What :meth:`confirm` gives, of a vector with its compensation, by the plain passes."""
        model, calibration = self.model.compensated(compensation), self.data["calibration"]

        def run_pass(thresholds: Any) -> tuple[Histograms, FloatArray]:
            histograms, seen, dropped = histogram_pass(model, calibration, thresholds)
            return histograms, dropped / np.maximum(seen, 1)

        _, thresholds, achieved, passes = operating_point(
            run_pass, self.histograms_of(problem), sparsities, problem.shape
        )
        row: dict[str, Any] = {"achieved": {"calibration": problem.shape.sparsity(achieved)}, "passes": passes}
        for split in self.evaluators:
            found = evaluate_thresholds(model, self.data[split], thresholds)
            row[f"{split}_nats"] = found.loss_nats
            row["achieved"][split] = problem.shape.sparsity(found.achieved)
        return {**row, "test_perplexity": perplexity(row["test_nats"])}

    def histograms_of(self, problem: Problem) -> Histograms:
        """The problem's histograms, unpacked once for runs of the same target."""
        if self._histograms is None or self._histograms[0] != problem.target:
            found = Histograms.from_bytes(problem.histograms, problem.shape.n_blocks)
            self._histograms = (problem.target, found)
        return self._histograms[1]

    def losses(
        self, problem: Problem, asked: list[tuple[FloatArray, IntArray]], fitness: FitnessName = "nll"
    ) -> list[FloatArray]:
        """Losses on the search split under the problem's shared thresholds, for a ledger.

        ``asked`` are vectors [L, 7] and the sequences that each is evaluated on.
        """
        histograms = self.histograms_of(problem)
        counts = [len(sequences) for _, sequences in asked]
        rows = np.repeat([histograms.thresholds(sparsities) for sparsities, _ in asked], counts, axis=0)
        found = self.fitness(fitness).losses(rows, np.concatenate([sequences for _, sequences in asked]))
        return np.split(found, np.cumsum(counts)[:-1])

    def confirm(self, problem: Problem, sparsities: FloatArray) -> dict[str, Any]:
        """Loss and achieved sparsity on both splits, with thresholds re-taken at the vector's own operating point."""
        key = (problem.target, sparsities.tobytes())
        if key not in self._confirmed:
            # The shared point is near, so fewer passes are needed than from the dense model.
            _, thresholds, achieved, passes = operating_point(
                self.run_pass, self.histograms_of(problem), sparsities, problem.shape
            )
            row: dict[str, Any] = {"achieved": {"calibration": problem.shape.sparsity(achieved)}, "passes": passes}
            for split, evaluator in self.evaluators.items():
                losses, dropped = evaluator.evaluate(thresholds)
                row[f"{split}_nats"] = float(losses.mean())
                row["achieved"][split] = problem.shape.sparsity(dropped.mean(axis=0) / self._channels(split))
            row["test_perplexity"] = perplexity(row["test_nats"])
            self._confirmed[key] = row
        return dict(self._confirmed[key])

    def _channels(self, split: str) -> IntArray:
        """Channels of one sequence outside the dense prefix, [L, 7]."""
        protocol = self.data[split].protocol
        return np.asarray(self.shape.in_features) * (protocol.sequence_length - protocol.dense_prefix)


def learning_text(data: dict[str, TokenSet], order_seed: int) -> TokenSet:
    """What a run learns a compensation from: the search split, and most of the text that slopes are taken on."""
    slopes = data["slope"]
    n = len(slopes.tokens)
    most = slopes.tokens[text_order(n, order_seed) < n - max(1, round(0.15 * n))]
    return TokenSet.of(slopes.protocol, np.concatenate([data["search"].tokens, most]))


def prepare(engine: Engine, targets: list[float]) -> list[Problem]:
    """Seeds and shared thresholds at each target, as a run makes them."""
    setup, shape = engine.setup, engine.shape
    dense, _ = engine.run_pass(None)
    greedy = Table("greedy", tuple(engine.block_table(b, dense) for b in range(shape.n_blocks)))
    dense_prices = fisher_prices(engine, dense)
    problems = []
    for target in targets:
        budget = SparsityBudget(shape, target)
        fisher = fisher_seed(dense_prices, DEFAULT_GRID, budget)
        end = engine.descend(dense, fisher.sparsities, target, SEED_DESCENT, SEED_SEQUENCES, setup.order_seed)
        fisher = point_seed("fisher", end, shape)
        histograms, _, _, _ = operating_point(engine.run_pass, dense, fisher.sparsities, shape)
        seeds = [*baseline_seeds(budget, greedy), fisher]
        problems.append(Problem(target, shape, seeds, histograms.to_bytes()))
    return problems


def fisher_prices(engine: Engine, histograms: Histograms) -> FloatArray:
    """Mean prices [L, 7, G] of the dense model in nats per token."""
    grid = [np.full((engine.shape.n_blocks, N_PROJECTIONS), level) for level in DEFAULT_GRID]
    levels = np.stack([histograms.thresholds(point) for point in grid], axis=-1)
    sums, n = engine.worker.run(Price(engine.data["calibration"].part(slice(engine.setup.pricing_sequences)), levels))
    return np.asarray(sums / n, np.float64)
