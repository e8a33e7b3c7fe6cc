"""Backward passes whose sequences are divided among workers; the sums have the bits of one worker's.

A part is what one backward pass takes at once (:func:`was_search.masks.slope.sequences_together`), whoever runs it,
and parts are added in their order. So a pass of a large model, of one sequence a part, is divided among as many
workers, and a small model's on a GPU is left whole: its parts would wait for launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from was_search.compensation import Vector
from was_search.coordinator.calls import Shared
from was_search.coordinator.contracts import WorkerPool
from was_search.coordinator.model_calls import BeginLearning, Descend, SlopePart
from was_search.masks.compensating import CompensationState
from was_search.masks.divergence import DenseTop
from was_search.masks.histogram import DeviceHistograms, Histograms, no_counts
from was_search.masks.slope import GPU_FLOP, SequenceDraws, part_flop, sequences_together
from was_search.masks.slope_sums import Slopes, SlopeSums, SumsOfParts, Window
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import EvaluationProtocol, TokenSet
from was_search.vectors.budget import Budget
from was_search.vectors.descent import Descent, DescentOptions


def parts_of(rows: list[int], shape: ModelShape, protocol: EvaluationProtocol, *, gpu: bool) -> list[list[int]]:
    """The parts of a pass over the sequences ``rows``, on GPUs or on CPUs."""
    together = sequences_together(shape, protocol, gpu=gpu)
    return [rows[first : first + together] for first in range(0, len(rows), together)]


def worth_dividing(pool: WorkerPool, n: int, shape: ModelShape, protocol: EvaluationProtocol) -> bool:
    """Whether passes over ``n`` sequences take less time in parts, if all of the pool's workers take part.

    A part costs its way to a worker and back, and the sums are read and added in one process: some hundredth of a
    second each, which a GPU's part has to outlast. A CPU's always does.
    """
    gpu = pool.gpus_per_worker > 0
    if pool.n_parallel < 2 or len(parts_of(list(range(n)), shape, protocol, gpu=gpu)) < 2:
        return False
    return not gpu or part_flop(shape, protocol, gpu=gpu) >= GPU_FLOP / 4


@dataclass(frozen=True, eq=False)
class PassesOnPool:
    """:class:`was_search.masks.compensating.LearningPasses` over the model of a pool's workers.

    Attributes:
        pool: whose workers share each pass.
        shape: the model's.
        data: what is learned from.
        top: the dense model's top of it.
    """

    pool: WorkerPool
    shape: ModelShape
    data: Shared[TokenSet]
    top: Shared[DenseTop]

    @property
    def protocol(self) -> EvaluationProtocol:
        return self.data.value.protocol

    @property
    def n_sequences(self) -> int:
        return len(self.data.value.tokens)

    def begin(
        self, rows: list[int], first_rows: list[int], state: CompensationState
    ) -> tuple[DeviceHistograms, Vector]:
        ((counts, spreads),) = self.pool.map([BeginLearning(self.data, rows, first_rows, state)])
        return DeviceHistograms(counts.add_to(no_counts(self.shape.n_blocks))), spreads

    def slopes(
        self,
        rows: list[int],
        sparsities: FloatArray,
        histograms: Histograms | DeviceHistograms,
        values: Vector,
        width: float,
    ) -> tuple[Slopes, Vector]:
        window = Window.around(sparsities, histograms)
        parts = parts_of(rows, self.shape, self.protocol, gpu=self.pool.gpus_per_worker > 0)
        shared = self.pool.share(values)
        found = SumsOfParts(self.shape.n_blocks)
        calls = [SlopePart(self.data, part, window, width, shared, self.top) for part in parts]
        for number, sums in enumerate(self.pool.map(calls)):
            found.add(number, sums)
        return found.slopes(self.shape, window, self.protocol, len(rows)), found.gradient


class DividedDescent:
    """One chain of a search's descents, whose rounds are calls for parts of a pass.

    It ends where :class:`was_search.coordinator.model_calls.Descend` with the same arguments does, to the bit.

    Args:
        data: what sequences are drawn from.
        histograms: taken near the start.
        start: [L, 7].
        budget: what every point spends.
        options: how it runs.
        per_round: sequences of a round.
        seed: decides their order.
        gpu: whether workers are on GPUs.
    """

    def __init__(
        self,
        data: Shared[TokenSet],
        histograms: Shared[Histograms],
        start: FloatArray,
        budget: Budget,
        options: DescentOptions,
        per_round: int,
        seed: int,
        *,
        gpu: bool,
    ) -> None:
        self._data, self._gpu = data, gpu
        self._shape = budget.shape
        self._histograms: Histograms | DeviceHistograms = histograms.value
        self._width = options.width
        self._draws = SequenceDraws(len(data.value.tokens), per_round, seed)
        self._descent = Descent(start, budget, options)
        self._begin_round()

    @property
    def rounds(self) -> int:
        """Rounds done."""
        return self._descent.rounds

    @property
    def end(self) -> FloatArray | None:
        """Where it ended; None before."""
        return self._descent.end

    @property
    def n_parts(self) -> int:
        """Parts of a round."""
        return len(self._parts)

    def call(self, part: int) -> SlopePart:
        """The call of a part of this round."""
        return SlopePart(self._data, self._parts[part], self._window, self._width)

    def take(self, part: int, sums: SlopeSums) -> bool:
        """Take a part's result in; returns whether that ended the round.

        Raises:
            InfeasibleError: slopes that are not finite.
        """
        self._found.add(part, sums)
        if len(self._found) < len(self._parts):
            return False
        protocol = self._data.value.protocol
        slopes = self._found.slopes(self._shape, self._window, protocol, sum(map(len, self._parts)))
        self._histograms = slopes.histograms
        self._descent.take(slopes.slopes)
        if self._descent.end is None:
            self._begin_round()
        return True

    def _begin_round(self) -> None:
        self._window = Window.around(self._descent.point, self._histograms)
        self._parts = parts_of(self._draws.next(), self._shape, self._data.value.protocol, gpu=self._gpu)
        self._found = SumsOfParts(self._shape.n_blocks)


def descend_on(
    pool: WorkerPool,
    data: Shared[TokenSet],
    histograms: Shared[Histograms],
    start: FloatArray,
    budget: Budget,
    options: DescentOptions,
    per_round: int,
    seed: int,
    *,
    phase: str,
) -> FloatArray:
    """The end of one descent, its rounds divided among all workers where that is worth it; nothing else runs.

    Args:
        pool: the workers.
        data: as for :class:`DividedDescent`, like all up to ``seed``.
        histograms: likewise.
        start: likewise.
        budget: likewise.
        options: likewise.
        per_round: likewise.
        seed: likewise.
        phase: for the log.
    """
    arguments = data, histograms, start, budget, options, per_round, seed
    if not worth_dividing(pool, min(per_round, len(data.value.tokens)), budget.shape, data.value.protocol):
        return pool.map([Descend(*arguments)], phase=phase)[0]
    divided = DividedDescent(*arguments, gpu=pool.gpus_per_worker > 0)
    while divided.end is None:
        sums = pool.map([divided.call(part) for part in range(divided.n_parts)])
        for part, found in enumerate(sums):
            divided.take(part, found)
    return divided.end
