"""What a search is asked for, and what it tells of its state."""

from __future__ import annotations

from dataclasses import dataclass, field

from was_search.budget import Budget
from was_search.control import NO_LIMITS, Limits, Spent
from was_search.latency import LatencyProfile
from was_search.pool_state import PoolState
from was_search.sampling import SamplerName
from was_search.slots import Slot
from was_search.space import SpaceName
from was_workers.descents import DescentPlan
from was_workers.quarantine import LONGEST_CALL_SECONDS


@dataclass(frozen=True)
class SearchOptions:
    """How a search runs; see :class:`was_search.settings.Settings` for each.

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
    descents: DescentPlan | None = None
    space: SpaceName = "levels"
    limits: Limits = NO_LIMITS
    elsewhere: Spent = field(default_factory=Spent)
    latency: LatencyProfile | None = None

    @property
    def longest_evaluation_seconds(self) -> float:
        """After which an evaluation is lost, whatever was measured."""
        return self.trial_timeout or LONGEST_CALL_SECONDS


@dataclass(frozen=True)
class SearchProgress:
    """The state of a study, for a progress bar.

    ``best`` is the best complete slot; ``saved`` the share of tokens that stopping early saved; ``current`` the slot
    that has just finished; ``activity`` what goes on besides evaluations; ``pool`` the workers.
    """

    total: int
    complete: int
    stopped: int
    failed: int
    best: Slot | None
    current: Slot | None
    saved: float = 0.0
    activity: str = ""
    pool: PoolState = field(default_factory=PoolState)

    @property
    def finished(self) -> int:
        return self.complete + self.stopped + self.failed
