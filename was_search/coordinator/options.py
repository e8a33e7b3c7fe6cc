"""The options of a search's loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from was_search.coordinator.contracts import LONGEST_CALL_SECONDS
from was_search.coordinator.descents import DescentPlan
from was_search.decode_time.profile import LatencyProfile
from was_search.studies.control import NO_LIMITS, Limits, Spent
from was_search.studies.sampling import SamplerName
from was_search.vectors.budget import Budget
from was_search.vectors.space import SpaceName


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a search runs; :class:`was_search.service.settings.Settings` explains each option.

    ``budget`` is what every vector spends; ``latency`` predicts what trials record of their decoding step;
    ``elsewhere`` is what other studies of the same command have spent of its limits on time.
    """

    budget: Budget
    sampler: SamplerName
    radius: float
    seed: int
    early_stopping: bool
    significance: float
    rung_keep: float
    trial_timeout: float
    max_attempts: int
    lag: int = 16
    descents: DescentPlan | None = None
    space: SpaceName = "levels"
    limits: Limits = NO_LIMITS
    elsewhere: Spent = field(default_factory=Spent)
    latency: LatencyProfile | None = None

    @property
    def longest_evaluation_seconds(self) -> float:
        """Time after which an evaluation counts as lost, whatever was measured."""
        return self.trial_timeout or LONGEST_CALL_SECONDS
