"""Learn a compensation and move the sparsities along: every step is one backward pass through hard masks.

A step draws a few sequences and takes the divergence from the dense model. Its gradient at a projection's output is the
gradient of the constants there, and gives that of the scales; the same pass gives the slope in every sparsity
(:mod:`was_search.masks.slope`). Adam (Kingma and Ba, ICLR 2015) moves the vectors; the sparsities go against their
slopes within the budget, as in a descent. Where channels are worth skipping depends on what is corrected: a vector that
is best with its compensation is often no better without.

A run is cut into calls of some steps. What one call leaves is all that the next needs, so a lost one is repeated and
gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from was_search.compensation import Compensation, Vector
from was_search.errors import InfeasibleError
from was_search.masks.calibration import histogram_pass
from was_search.masks.corrections import LearnedCorrections, output_spreads
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import DeviceHistograms, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.slope import slope_pass
from was_search.masks.slope_sums import Slopes
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import EvaluationProtocol, TokenSet
from was_search.vectors.budget import Budget
from was_search.vectors.descent import HIGHEST_DESCENDED, moved


@dataclass(frozen=True)
class CompensationOptions:
    """How a compensation is learned. Rates and the step rise for ten steps and fall along a cosine.

    Attributes:
        steps: backward passes.
        sequences: of each pass.
        scale_rate: Adam's rate for the scales.
        constant_rate: that for the constants, as a share of the outputs' root mean square.
        move: root mean square of the sparsities' move in a step; 0 leaves them where they are.
        momentum: share of the former slopes in the present ones.
        average: share of the steps, from the end, whose sparsities are averaged.
        width: half width of the band of scores whose channels pass the gradient on, as a share of the threshold.
    """

    steps: int = 150
    sequences: int = 4
    scale_rate: float = 2e-3
    constant_rate: float = 4e-3
    move: float = 0.004
    momentum: float = 0.9
    average: float = 0.3
    width: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 1, "must be at least 1"),
            "sequences": (self.sequences >= 1, "must be at least 1"),
            "scale_rate": (self.scale_rate >= 0.0, "must not be negative"),
            "constant_rate": (self.constant_rate >= 0.0, "must not be negative"),
            "move": (0.0 <= self.move < 1.0, "must be in [0, 1)"),
            "momentum": (0.0 <= self.momentum < 1.0, "must be in [0, 1)"),
            "average": (0.0 < self.average <= 1.0, "must be in (0, 1]"),
            "width": (self.width >= 0.0, "must not be negative"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise InfeasibleError(f"{name}: {rule}, got {getattr(self, name)}")

    def factor(self, number: int) -> float:
        """What rates and the move are multiplied by in step ``number``, counted from 0."""
        falling = _LAST + (1.0 - _LAST) * 0.5 * (1.0 + math.cos(math.pi * number / self.steps))
        return min(1.0, (number + 1) / _WARM) * falling

    @property
    def first_averaged(self) -> int:
        """The first step after which the sparsities count in the average."""
        return self.steps - max(1, round(self.average * self.steps))


_WARM = 10
_LAST = 0.02
_CLIP = 2.0
_BETAS = (0.9, 0.99)


@dataclass(frozen=True, eq=False)
class CompensationState:
    """What is known after some steps: all that the next one needs.

    Attributes:
        done: steps done.
        sparsities: float64 [L, 7].
        thresholds: near those of the sparsities, float32 [L, 7].
        values: flat values of the compensation, float32.
        moments: Adam's first and second moments of the values' gradients, float32 [2, values].
        direction: mean slopes per parameter, float64 [L, 7].
        kept: sum of the sparsities that are averaged, float64 [L, 7].
        losses: divergence of each step, nats per token.
    """

    done: int
    sparsities: FloatArray
    thresholds: npt.NDArray[np.float32]
    values: Vector
    moments: Vector
    direction: FloatArray
    kept: FloatArray
    losses: tuple[float, ...] = ()

    @classmethod
    def start(cls, shape: ModelShape, sparsities: FloatArray, thresholds: npt.NDArray[np.float32]) -> CompensationState:
        """Before the first step: nothing is corrected."""
        values, nothing = Compensation.none(shape).flat(), np.zeros(sparsities.shape)
        return cls(0, sparsities, thresholds, values, np.zeros((2, values.size), np.float32), nothing, nothing)

    def compensation(self, shape: ModelShape) -> Compensation:
        return Compensation.from_flat(shape, self.values)

    def mean_sparsities(self, budget: Budget, options: CompensationOptions) -> FloatArray:
        """The sparsities that a finished run ends with."""
        return budget.onto(self.kept / (options.steps - options.first_averaged), HIGHEST_DESCENDED)


def step_rows(n_sequences: int, options: CompensationOptions, seed: int, number: int) -> list[int]:
    """The sequences of step ``number``: all of the ``n_sequences`` come once before one comes again."""
    each = min(options.sequences, n_sequences)
    rounds = -(-(number + 1) * each // n_sequences)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(n_sequences) for _ in range(rounds)])
    return [int(row) for row in order[number * each : (number + 1) * each]]


class LearningPasses(Protocol):
    """The passes over a model that steps are made of; the model may be here or on workers."""

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        ...

    @property
    def protocol(self) -> EvaluationProtocol:
        """That of the text that is learned from."""
        ...

    @property
    def n_sequences(self) -> int:
        """Sequences of that text."""
        ...

    def begin(
        self, rows: list[int], first_rows: list[int], state: CompensationState
    ) -> tuple[Histograms | DeviceHistograms, Vector]:
        """What is known before a step: histograms of ``rows`` at the state, and spreads of outputs on ``first_rows``.

        Raises:
            InfeasibleError: scores that are not finite.
        """
        ...

    def slopes(
        self,
        rows: list[int],
        sparsities: FloatArray,
        histograms: Histograms | DeviceHistograms,
        values: Vector,
        width: float,
    ) -> tuple[Slopes, Vector]:
        """The slopes of ``rows``, corrected by the flat ``values``, and the summed loss's gradient in these."""
        ...


@dataclass(frozen=True, eq=False)
class PassesHere:
    """:class:`LearningPasses` over a model in this process.

    Attributes:
        model: its parameters may be frozen.
        data: what is learned from.
        top: the dense model's top of it.
    """

    model: MaskedModel
    data: TokenSet
    top: DenseTop

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def protocol(self) -> EvaluationProtocol:
        return self.data.protocol

    @property
    def n_sequences(self) -> int:
        return len(self.data.tokens)

    def begin(self, rows: list[int], first_rows: list[int], state: CompensationState) -> tuple[Histograms, Vector]:
        return learning_start(self.model, self.data.part(rows), self.data.part(first_rows), state)

    def slopes(
        self,
        rows: list[int],
        sparsities: FloatArray,
        histograms: Histograms | DeviceHistograms,
        values: Vector,
        width: float,
    ) -> tuple[Slopes, Vector]:
        learned = self._learned
        learned.start(values)
        found = slope_pass(
            *(self.model, self.data.part(rows), sparsities, histograms),
            width=width,
            learned=learned,
            top=self.top[rows],
        )
        return found, learned.gradient()

    @cached_property
    def _learned(self) -> LearnedCorrections:
        return self.model.learned_corrections()


def learning_start(
    model: MaskedModel, data: TokenSet, first: TokenSet, state: CompensationState
) -> tuple[Histograms, Vector]:
    """What :meth:`LearningPasses.begin` gives, of the sequences ``data`` and ``first``."""
    corrected = model.compensated(state.compensation(model.shape))
    histograms = histogram_pass(corrected, data, state.thresholds)[0]
    _require_finite(histograms.finite)
    return histograms, _spreads(model, first)


def learn_steps(
    passes: LearningPasses,
    state: CompensationState,
    budget: Budget,
    options: CompensationOptions,
    *,
    seed: int,
    steps: int,
) -> CompensationState:
    """The state after ``steps`` more steps, at most to the last.

    Args:
        passes: over the model and the text that is learned from.
        state: where to go on.
        budget: what every vector of sparsities spends.
        options: of the whole run.
        seed: decides the order of the sequences.
        steps: of this call.

    Raises:
        InfeasibleError: gradients that are not finite.
    """
    shape, n = passes.shape, passes.n_sequences
    share = shape.params / shape.params.sum()
    rows, first_rows = (step_rows(n, options, seed, number) for number in (state.done, 0))
    histograms, spreads = passes.begin(rows, first_rows, state)
    still, units = Compensation.none(shape).flat(), _units(spreads, options)
    moved_by = torch.nn.Parameter(
        torch.from_numpy(np.divide(state.values - still, units, where=units > 0, out=still * 0))
    )
    optimiser = _optimiser(moved_by, state)
    for number in range(state.done, min(state.done + steps, options.steps)):
        rows = step_rows(n, options, seed, number)
        values = _values(still, moved_by, units)
        found, gradient = passes.slopes(rows, state.sparsities, histograms, values, options.width)
        predicted = len(rows) * passes.protocol.predicted_per_sequence
        gradient = gradient / np.float32(predicted) * units
        _require_finite(bool(np.all(np.isfinite(gradient)) and np.all(np.isfinite(found.slopes))))
        moved_by.grad = torch.from_numpy(gradient)
        optimiser.param_groups[0]["lr"] = options.factor(number)
        optimiser.step()
        histograms = found.histograms
        state = _moved(state, found.slopes / share, found.nats, budget, options)
    moments = optimiser.state[moved_by]
    return replace(
        state,
        thresholds=histograms.thresholds(state.sparsities),
        values=_values(still, moved_by, units),
        moments=np.stack([moments["exp_avg"].numpy(), moments["exp_avg_sq"].numpy()]),
    )


def _require_finite(finite: bool) -> None:
    if not finite:
        raise InfeasibleError("compensation: the model's activations or gradients overflow; use bfloat16 or float32")


def _spreads(model: MaskedModel, data: TokenSet) -> Vector:
    """The spread of each output, laid out like the scales."""
    backbone = getattr(model.model, "model", model.model)

    @torch.inference_mode()
    def forward() -> None:
        for batch in model.batches(data):
            backbone(input_ids=batch, use_cache=False)

    return output_spreads(model.structure, forward)


def _units(spreads: Vector, options: CompensationOptions) -> Vector:
    """What a value moves by at Adam's rate 1: scales by their rate, constants by a share of the outputs' spread."""
    rates = np.full_like(spreads, options.scale_rate), np.float32(options.constant_rate) * spreads
    return np.concatenate(rates)


def _values(still: Vector, moved_by: torch.nn.Parameter, units: Vector) -> Vector:
    found: Vector = still + moved_by.detach().numpy().astype(np.float32) * units
    return found


def _optimiser(moved_by: torch.nn.Parameter, state: CompensationState) -> torch.optim.Adam:
    optimiser = torch.optim.Adam([moved_by], lr=1.0, betas=_BETAS, eps=1e-12)
    first, second = (torch.from_numpy(moment.copy()) for moment in state.moments)
    optimiser.state[moved_by] = {
        "step": torch.tensor(float(state.done)),
        "exp_avg": first,
        "exp_avg_sq": second,
    }
    return optimiser


def _moved(
    state: CompensationState, per_parameter: FloatArray, loss: float, budget: Budget, options: CompensationOptions
) -> CompensationState:
    """The state with its sparsities moved against these slopes."""
    former = options.momentum if state.done else 0.0
    direction = former * state.direction + (1.0 - former) * per_parameter
    length, sparsities = options.move * options.factor(state.done), state.sparsities
    if length > 0.0:
        sparsities = moved(sparsities, direction, budget, length, _CLIP)
    return replace(
        state,
        done=state.done + 1,
        sparsities=sparsities,
        direction=direction,
        kept=state.kept + sparsities if state.done >= options.first_averaged else state.kept,
        losses=(*state.losses, loss),
    )
