"""Projected gradient descent on all 7L sparsities at a fixed budget: a pure algorithm on arrays.

At the best point no parameter (of a budget of time: no microsecond) is cheaper to save than another. So the step
goes against the slope per parameter, less what would leave the budget (of sparsity: its mean), and is projected
back. Its length is fixed in sparsity, not in nats (slopes grow by an order of magnitude from 50 % to 80 %), and falls
along a cosine. Slopes come from a few sequences each; momentum and the average of the last points (Polyak and
Juditsky, SIAM J. Control Optim. 1992) take their noise out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from was_search.errors import InfeasibleError
from was_search.shape import FloatArray
from was_search.vectors.budget import Budget

HIGHEST_DESCENDED = 0.98
"""Highest sparsity of a projection in a descent."""

CHAIN_STEPS = (0.04, 0.015)
"""First steps of chains side by side, by turns.

The long one gets further from a start that is far off; the short one has less noise at its end, and so finds something
where little is left to find.
"""


@dataclass(frozen=True)
class DescentOptions:
    """How a descent runs.

    Attributes:
        rounds: steps, and so calls for slopes.
        step: root mean square of the first step over the projections, in sparsity.
        last_step: the last step, as a share of the first.
        momentum: share of the former direction in the present one, in [0, 1).
        clip: greatest move of a projection in one round, in multiples of the step.
        average: share of the rounds, from the end, whose points are averaged, in (0, 1].
        width: half width of the band of scores whose channels pass the gradient on, as a share of the threshold.
    """

    rounds: int = 30
    step: float = 0.04
    last_step: float = 0.3
    momentum: float = 0.7
    clip: float = 2.0
    average: float = 1 / 3
    width: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "rounds": (self.rounds >= 1, "must be at least 1"),
            "step": (0.0 < self.step < 1.0, "must be in (0, 1)"),
            "last_step": (0.0 < self.last_step <= 1.0, "must be in (0, 1]"),
            "momentum": (0.0 <= self.momentum < 1.0, "must be in [0, 1)"),
            "clip": (self.clip > 0.0, "must be positive"),
            "average": (0.0 < self.average <= 1.0, "must be in (0, 1]"),
            "width": (self.width >= 0.0, "must not be negative"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise InfeasibleError(f"{name}: {rule}, got {getattr(self, name)}")

    def in_epoch(self, epoch: int, step: float, decay: float = 0.5) -> DescentOptions:
        """Options of a chain in ``epoch``: the first begins with ``step``, each further one with ``decay`` of that."""
        return replace(self, step=step * decay**epoch)


def descend(
    slopes: Callable[[FloatArray], FloatArray],
    start: FloatArray,
    budget: Budget,
    options: DescentOptions,
) -> FloatArray:
    """The average of the last points of a descent from ``start`` [L, 7]; meets ``budget`` exactly.

    Args:
        slopes: sparsities [L, 7] -> slopes of the loss [L, 7], nats per token and unit of sparsity; may be noisy.
        start: any point; it is projected onto the budget first.
        budget: what every point spends; its shape weighs the projections.
        options: how the descent runs.

    Raises:
        InfeasibleError: slopes that are not finite, or a budget that cannot be reached.
    """
    descent = Descent(start, budget, options)
    while descent.end is None:
        descent.take(slopes(descent.point))
    return descent.end


class Descent:
    """A descent whose slopes are taken elsewhere: at :attr:`point`, and given to :meth:`take`, until there is an end.

    Args:
        start: any point; it is projected onto the budget first.
        budget: what every point spends; its shape weighs the projections.
        options: how it runs.

    Attributes:
        point: where slopes are wanted next, [L, 7].
        rounds: rounds done.
        end: the average of the last points, once all rounds are done.
    """

    def __init__(self, start: FloatArray, budget: Budget, options: DescentOptions) -> None:
        self._budget = budget
        self._options = options
        self._share = budget.shape.params / budget.shape.params.sum()
        self._direction: FloatArray | None = None
        self._kept: list[FloatArray] = []
        self.point = budget.onto(start, HIGHEST_DESCENDED)
        self.rounds = 0
        self.end: FloatArray | None = None

    def take(self, slopes: FloatArray) -> None:
        """Move on by a round.

        Raises:
            InfeasibleError: ``slopes`` that are not finite, or a budget that cannot be reached.
        """
        if not np.all(np.isfinite(slopes)):
            raise InfeasibleError("slopes: must be finite; the model's gradients overflow, use bfloat16 or float32")
        options, per_parameter = self._options, slopes / self._share
        if self._direction is None:
            self._direction = per_parameter
        else:
            self._direction = options.momentum * self._direction + (1.0 - options.momentum) * per_parameter
        self.point = moved(self.point, self._direction, self._budget, _step(self.rounds, options), options.clip)
        if self.rounds >= options.rounds - max(1, round(options.average * options.rounds)):
            self._kept.append(self.point)
        self.rounds += 1
        if self.rounds == options.rounds:
            self.end = self._budget.onto(np.mean(self._kept, axis=0), HIGHEST_DESCENDED)


def moved(point: FloatArray, direction: FloatArray, budget: Budget, length: float, clip: float) -> FloatArray:
    """``point`` [L, 7] moved against ``direction`` [L, 7], a slope per parameter, within the budget.

    The move's root mean square is ``length``, and no projection moves further than ``clip`` times that.
    """
    along = _unit(budget.tangent(direction, point), clip)
    return budget.onto(point - length * along, HIGHEST_DESCENDED)


def chain_steps(chains: int) -> tuple[float, ...]:
    """The first steps of an epoch's ``chains`` chains."""
    return tuple(CHAIN_STEPS[chain % len(CHAIN_STEPS)] for chain in range(chains))


def chain_seed(seed: int, epoch: int, chain: int) -> int:
    """Seed by which a chain draws its sequences, made of the search's ``seed``."""
    return int(np.random.SeedSequence([seed, epoch, chain]).generate_state(1)[0])


def _step(number: int, options: DescentOptions) -> float:
    falling = 0.5 * (1.0 + np.cos(np.pi * number / options.rounds))
    return options.step * float(options.last_step + (1.0 - options.last_step) * falling)


def _unit(along: FloatArray, clip: float) -> FloatArray:
    """``along`` at root mean square 1, clipped."""
    scale = float(np.sqrt(np.mean(along**2)))
    return np.clip(along / scale, -clip, clip) if scale > 0.0 else along
