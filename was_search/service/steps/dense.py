"""What is known of the dense model: the same for every target of a command."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from was_search.compensation import Compensation
from was_search.coordinator.calls import Shared
from was_search.masks.divergence import DenseTop
from was_search.service.context import Context
from was_search.service.steps.calibration import Calibration, OperatingPoint, calibrate, operating_point, point_key
from was_search.service.steps.dense_predictions import dense_top
from was_search.service.steps.pricing import fisher_prices
from was_search.service.token_sets import TokenSets
from was_search.shape import FloatArray


@dataclass(frozen=True)
class Dense:
    """Each part is taken from the cache, or computed on the workers, when it is first needed.

    Attributes:
        context: opens workers and cache; its settings name model, data and protocol.
    """

    context: Context
    _points: dict[str, OperatingPoint] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tokens(self) -> TokenSets:
        return TokenSets(self.context)

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.context, self.tokens)

    @cached_property
    def prices(self) -> FloatArray:
        """Prices [L, 7, G] in nats per token at the default grid."""
        from was_search.masks.pricing import DEFAULT_GRID

        return fisher_prices(self.context, self.calibration, self.tokens.calibration, DEFAULT_GRID)

    @cached_property
    def top(self) -> DenseTop | None:
        """Its top predictions on the search split; None for the fitness ``nll``."""
        if self.context.settings.fitness == "nll":
            return None
        return dense_top(self.context, self.tokens.search)

    @cached_property
    def shared_top(self) -> Shared[DenseTop] | None:
        """The same where the workers find it."""
        return None if self.top is None else self.context.pool.share(self.top)

    def point(self, sparsities: FloatArray, name: str, compensation: Compensation | None = None) -> OperatingPoint:
        """The operating point of a vector [L, 7] that is called ``name``, outputs corrected by ``compensation``."""
        key = point_key(self.calibration, sparsities, compensation)
        if key not in self._points:
            self._points[key] = operating_point(
                self.context, self.calibration, self.tokens, sparsities, name, compensation
            )
        return self._points[key]
