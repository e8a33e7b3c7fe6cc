"""The state of a search while it runs, for progress bars and pages."""

from __future__ import annotations

from dataclasses import dataclass, field

from was_search.studies.pool_state import PoolState
from was_search.studies.slots import Slot


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
