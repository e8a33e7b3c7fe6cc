"""The state of a pool of workers at a moment: for status, metrics and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Quarantined:
    """A worker that is given no slots for now: its name, why, and since when (ISO 8601)."""

    worker: str
    reason: str
    since: str


@dataclass(frozen=True)
class PoolState:
    """How many workers are doing what.

    Attributes:
        asked: how many are to be there, ``4`` or ``2:64``.
        ready: workers that hold the model and are given slots.
        loading: workers that have a place and load the model.
        pending: workers that the cluster has no place for yet.
        draining: workers on nodes that are about to go, or let go themselves; each ends its call.
        quarantined: workers that are given no slots for now.
    """

    asked: str = ""
    ready: int = 0
    loading: int = 0
    pending: int = 0
    draining: int = 0
    quarantined: tuple[Quarantined, ...] = ()

    @property
    def placed(self) -> int:
        """Number of workers that have a place: ready ones, and those that load."""
        return self.ready + self.loading

    @property
    def counts(self) -> dict[str, int]:
        """Workers by state."""
        return {
            "ready": self.ready,
            "loading": self.loading,
            "pending": self.pending,
            "draining": self.draining,
            "quarantined": len(self.quarantined),
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "quarantined": [asdict(each) for each in self.quarantined]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PoolState:
        """Read what :meth:`to_json` gives; what is missing has its default."""
        fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        quarantined = tuple(Quarantined(**each) for each in fields.pop("quarantined", ()))
        return cls(**fields, quarantined=quarantined)
