"""The calls of calibration, pricing, descents, evaluations and the rest: what a worker does with its model."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from was_search.compensation import Compensation, Vector
from was_search.coordinator.calls import Call, Shared
from was_search.errors import InfeasibleError
from was_search.masks.beside_dense import Part, evaluate_beside_dense
from was_search.masks.block_error import block_error
from was_search.masks.calibration import histogram_pass
from was_search.masks.compensating import (
    CompensationOptions,
    CompensationState,
    PassesHere,
    learn_steps,
    learning_start,
)
from was_search.masks.divergence import DenseTop
from was_search.masks.early_stop import StopRule
from was_search.masks.evaluation import dense_top, evaluate_thresholds
from was_search.masks.finite import NotFiniteError, check_finite
from was_search.masks.histogram import Histograms, PackedCounts
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.masks.pricing import price_sums
from was_search.masks.slope import SlopeOracle, slope_point
from was_search.masks.slope_sums import SlopeSums, Window
from was_search.shape import FloatArray, IntArray
from was_search.texts.protocol import Evaluation, EvaluationProtocol, TokenSet
from was_search.vectors.budget import Budget
from was_search.vectors.descent import DescentOptions, descend
from was_search.vectors.greedy import block_path
from was_search.vectors.table import BlockTable

Thresholds = npt.NDArray[np.float32]
"""Thresholds of all projections, float32 [L, 7]."""


@dataclass(frozen=True, eq=False)
class Norms(Call[list[list[npt.NDArray[np.float32]]]]):
    """Column norms, L rows of seven float32 [in_features]."""

    name: ClassVar[str] = "norms"
    words: ClassVar[str] = "column norms"

    def run(self, model: MaskedModel) -> list[list[npt.NDArray[np.float32]]]:
        return [[norm.cpu().numpy() for norm in row] for row in model.norms]


@dataclass(frozen=True, eq=False)
class Calibrate(Call[tuple[Histograms, IntArray, IntArray]]):
    """A pass of histograms over ``data`` (:func:`was_search.masks.calibration.histogram_pass`); dense for None.

    Under thresholds, outputs are corrected by the ``compensation``, if there is one.
    """

    name: ClassVar[str] = "calibration pass"
    words: ClassVar[str] = "a calibration pass"

    data: Shared[TokenSet]
    thresholds: Thresholds | None
    compensation: Shared[Compensation] | None = None

    @property
    def tokens(self) -> float:
        return float(self.data.value.tokens.size)

    def run(self, model: MaskedModel) -> tuple[Histograms, IntArray, IntArray]:
        found = histogram_pass(_compensated(model, self.compensation), self.data.value, self.thresholds)
        if not found[0].finite:
            raise NotFiniteError("calibration" if self.thresholds is None else "calibration under masks")
        return found

    def figures(self, found: tuple[Histograms, IntArray, IntArray]) -> dict[str, Any]:
        return {"tokens": self.data.value.tokens.size}


@dataclass(frozen=True, eq=False)
class Price(Call[tuple[FloatArray, int]]):
    """Sums of prices over ``data``, and its tokens (:func:`was_search.masks.pricing.price_sums`); levels [L, 7, G]."""

    name: ClassVar[str] = "pricing"
    words: ClassVar[str] = "pricing"

    data: TokenSet
    level_thresholds: npt.NDArray[np.float32]

    @property
    def tokens(self) -> float:
        return float(self.data.tokens.size)

    def run(self, model: MaskedModel) -> tuple[FloatArray, int]:
        sums, n = price_sums(model, self.data, self.level_thresholds)
        check_finite(sums, "prices (the gradients of the dense model)")
        return sums, n

    def figures(self, found: tuple[FloatArray, int]) -> dict[str, Any]:
        return {"tokens": self.data.tokens.size}


def _compensated(model: MaskedModel, compensation: Shared[Compensation] | None) -> MaskedModel:
    return model if compensation is None else model.compensated(compensation.value)


def descent_tokens(protocol: EvaluationProtocol, options: DescentOptions, per_round: int) -> int:
    """Tokens of one descent, forward and backward counted as three forwards."""
    return 3 * options.rounds * min(per_round, protocol.n_sequences) * protocol.predicted_per_sequence


@dataclass(frozen=True, eq=False)
class Descend(Call[FloatArray]):
    """One descent from ``start`` [L, 7]: :func:`was_search.vectors.descent.descend`.

    Slopes come from ``per_round`` sequences of ``data`` a round, drawn by ``seed``.
    """

    name: ClassVar[str] = "descent"
    words: ClassVar[str] = "a descent"

    data: Shared[TokenSet]
    histograms: Shared[Histograms]
    start: FloatArray
    budget: Budget
    options: DescentOptions
    per_round: int
    seed: int

    @property
    def tokens(self) -> float:
        return float(descent_tokens(self.data.value.protocol, self.options, self.per_round))

    def run(self, model: MaskedModel) -> FloatArray:
        slopes = SlopeOracle(
            model,
            self.data.value,
            self.histograms.value,
            per_call=self.per_round,
            seed=self.seed,
            width=self.options.width,
        )
        return descend(slopes, self.start, self.budget, self.options)

    def figures(self, found: FloatArray) -> dict[str, Any]:
        return {"rounds": self.options.rounds}


@dataclass(frozen=True, eq=False)
class LearnCompensation(Call[CompensationState]):
    """Some steps of a compensation's learning: :func:`was_search.masks.compensating.learn_steps`."""

    name: ClassVar[str] = "compensation"
    words: ClassVar[str] = "steps of a compensation"

    data: Shared[TokenSet]
    top: Shared[DenseTop]
    state: CompensationState
    budget: Budget
    options: CompensationOptions
    seed: int
    steps: int

    @property
    def tokens(self) -> float:
        n, length = self.data.value.tokens.shape
        return 3.0 * self.steps * min(self.options.sequences, int(n)) * int(length)

    def run(self, model: MaskedModel) -> CompensationState:
        passes = PassesHere(model, self.data.value, self.top.value)
        return learn_steps(passes, self.state, self.budget, self.options, seed=self.seed, steps=self.steps)

    def figures(self, found: CompensationState) -> dict[str, Any]:
        return {"steps": found.done, "loss_nats": found.losses[-1]}


@dataclass(frozen=True, eq=False)
class BeginLearning(Call[tuple[PackedCounts, Vector]]):
    """What is known before a step of a compensation: :func:`was_search.masks.compensating.learning_start`."""

    name: ClassVar[str] = "beginning of a compensation"
    words: ClassVar[str] = "the beginning of a compensation"

    data: Shared[TokenSet]
    rows: list[int]
    first_rows: list[int]
    state: CompensationState

    @property
    def tokens(self) -> float:
        return float((len(self.rows) + len(self.first_rows)) * self.data.value.tokens.shape[1])

    def run(self, model: MaskedModel) -> tuple[PackedCounts, Vector]:
        data = self.data.value
        histograms, spreads = learning_start(model, data.part(self.rows), data.part(self.first_rows), self.state)
        return PackedCounts.of(torch.from_numpy(histograms.counts)), spreads


@dataclass(frozen=True, eq=False)
class SlopePart(Call[SlopeSums]):
    """The backward passes of some sequences: a part of a pass that is divided among workers.

    With ``values`` outputs are corrected by that flat compensation, which gets its gradient. The loss is the NLL, or
    with ``top`` the divergence from the dense model.
    """

    name: ClassVar[str] = "part of a pass"
    words: ClassVar[str] = "a part of a backward pass"

    data: Shared[TokenSet]
    rows: list[int]
    window: Window
    width: float
    values: Shared[Vector] | None = None
    top: Shared[DenseTop] | None = None

    @property
    def tokens(self) -> float:
        return 3.0 * len(self.rows) * int(self.data.value.tokens.shape[1])

    def run(self, model: MaskedModel) -> SlopeSums:
        learned = None if self.values is None else model.learned_corrections()
        if learned is not None and self.values is not None:
            learned.start(self.values.value)
        point = slope_point(
            *(model, self.data.value.part(self.rows), self.window),
            width=self.width,
            learned=learned,
            top=None if self.top is None else self.top.value[self.rows],
        )
        return SlopeSums.of(point)


@dataclass(frozen=True, eq=False)
class GreedyBlock(Call[BlockTable]):
    """Greedy table of one block by block-output error on ``data``, with the dense model's histograms."""

    name: ClassVar[str] = "greedy table"
    words: ClassVar[str] = "a block's greedy table"

    block: int
    data: Shared[TokenSet]
    dense: Shared[Histograms]
    step: float

    @property
    def tokens(self) -> float:
        return float(self.data.value.tokens.size)

    def run(self, model: MaskedModel) -> BlockTable:
        error = block_error(model, self.data.value, self.block, self.dense.value)
        try:
            return block_path(error, model.shape.params[self.block], step=self.step, groups=model.shape.groups)
        except InfeasibleError as cause:  # no level was asked for that could be infeasible
            raise NotFiniteError(f"greedy table of block {self.block}") from cause

    def figures(self, found: BlockTable) -> dict[str, Any]:
        return {"block": self.block}


@dataclass(frozen=True, eq=False)
class FindDenseTop(Call[DenseTop]):
    """The dense model's top ``k`` on ``data``: :func:`was_search.masks.evaluation.dense_top`."""

    name: ClassVar[str] = "dense top"
    words: ClassVar[str] = "the dense model's predictions"

    data: TokenSet
    k: int

    @property
    def tokens(self) -> float:
        return float(self.data.tokens.size)

    def run(self, model: MaskedModel) -> DenseTop:
        top = dense_top(model, self.data, self.k)
        check_finite(top.log_probs[..., :-1], "predictions of the dense model")
        return top

    def figures(self, found: DenseTop) -> dict[str, Any]:
        return {"tokens": self.data.tokens.size}


@dataclass(frozen=True, eq=False)
class Evaluate(Call[Evaluation]):
    """Evaluate one vector [L, 7] of a search, with thresholds from shared histograms.

    The fitness is the NLL, or with ``top`` the divergence from the dense model. Its tokens are known once it has
    ended, since ``rule`` may stop it.
    """

    name: ClassVar[str] = "evaluation"
    words: ClassVar[str] = "an evaluation"

    data: Shared[TokenSet]
    histograms: Shared[Histograms]
    sparsities: FloatArray
    rule: StopRule | None = None
    top: Shared[DenseTop] | None = None

    def run(self, model: MaskedModel) -> Evaluation:
        thresholds = self.histograms.value.thresholds(self.sparsities)
        top = None if self.top is None else self.top.value
        return evaluate_thresholds(model, self.data.value, thresholds, rule=self.rule, top=top)

    def figures(self, found: Evaluation) -> dict[str, Any]:
        return _figures(found)


@dataclass(frozen=True, eq=False)
class EvaluateThresholds(Call[Evaluation]):
    """Evaluate given thresholds, or the dense model for None; by divergence if there is a ``top``."""

    name: ClassVar[str] = "plan evaluation"
    words: ClassVar[str] = "a plan's evaluation"

    data: TokenSet
    thresholds: Thresholds | None
    top: Shared[DenseTop] | None = None
    compensation: Shared[Compensation] | None = None

    @property
    def tokens(self) -> float:
        return float(self.data.tokens.size)

    def run(self, model: MaskedModel) -> Evaluation:
        top = None if self.top is None else self.top.value
        model = _compensated(model, self.compensation)
        found = evaluate_thresholds(model, self.data, self.thresholds, top=top)
        if self.thresholds is None:
            check_finite(found.losses, "loss of the dense model")
        return found

    def figures(self, found: Evaluation) -> dict[str, Any]:
        return _figures(found)


@dataclass(frozen=True, eq=False)
class EvaluateBesideDense(Call[list[Part]]):
    """The dense model and several thresholds on ``data``: :func:`was_search.masks.beside_dense.evaluate_beside_dense`.

    Each of the thresholds has its compensation, or None. ``data`` may be a part of a split, cut at whole batches.
    """

    name: ClassVar[str] = "evaluation beside dense"
    words: ClassVar[str] = "plans' evaluation beside the dense model"

    data: TokenSet
    thresholds: tuple[Thresholds, ...]
    compensations: tuple[Shared[Compensation] | None, ...]

    @property
    def tokens(self) -> float:
        return float(self.data.tokens.size * (1 + len(self.thresholds)))

    def run(self, model: MaskedModel) -> list[Part]:
        prefix = self.data.protocol.dense_prefix
        pairs = zip(self.thresholds, self.compensations, strict=True)
        maskings = [Masking(_compensated(model, by), each, dense_prefix=prefix, count=True) for each, by in pairs]
        found = evaluate_beside_dense(model, self.data, maskings)
        check_finite(found[0].losses, "loss of the dense model")
        return found

    def figures(self, found: list[Part]) -> dict[str, Any]:
        return {"tokens": sum(part.tokens for part in found)}


def _figures(found: Evaluation) -> dict[str, Any]:
    return {
        "loss_nats": found.loss_nats,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "stopped_early": found.stopped_early,
    }


@dataclass(frozen=True, eq=False)
class PeakBytes(Call[int]):
    """Greatest memory held: on GPUs torch's since the last such call, on CPU the process's since its start."""

    name: ClassVar[str] = "peak memory"
    words: ClassVar[str] = "its peak memory"

    def run(self, model: MaskedModel) -> int:
        devices = {model.device, *model.block_devices}
        if model.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
