"""What is asked of a study from outside while it runs, what ends a search, and why one ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from was_search.errors import ConfigError
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import Slot, SlotState
from was_search.studies.worker_range import WorkerRange

MOST_TRIALS = 1_000_000
_LARGEST = 1_000_000_000


class Wish(StrEnum):
    """What the coordinator of a study is to do."""

    RUN = "run"
    PAUSE = "pause"
    DRAIN = "drain"
    CANCEL = "cancel"

    @property
    def ends(self) -> bool:
        """Whether the wish ends the run that obeys it; the next run takes it back."""
        return self in (Wish.DRAIN, Wish.CANCEL)


class EndingKind(StrEnum):
    """How a run of a study's search ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    DRAINED = "drained"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class Ending:
    """How a run ended, and which rule, or which error, ended it."""

    kind: EndingKind = EndingKind.FINISHED
    detail: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether somebody ended the run early: the same command goes on with the study."""
        return self.kind in (EndingKind.DRAINED, EndingKind.CANCELLED)

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else str(self.kind)


LAST_SLOT = Ending()
"""The ordinary end of a run: all slots have finished."""


@dataclass(frozen=True)
class Spent:
    """What a study has used up.

    Attributes:
        seconds: time of searching, pauses left out, all runs together.
        gpu_seconds: time of GPUs held by its workers during searches, pauses included.
    """

    seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.gpu_seconds + other.gpu_seconds)


NOTHING_SPENT = Spent()


@dataclass(frozen=True)
class Usage:
    """What one run has used so far, as its coordinator writes it down every few seconds.

    Attributes:
        spent: time and GPU time of this run.
        worker_seconds: time of workers that held the model.
        workers: size of the pool, without workers that wait for a place, go, or are in quarantine.
        paused: whether it hands nothing out.
        pool: all workers by state; None where nothing is known.
        activity: what it does besides evaluations, in words; "" for nothing.
    """

    spent: Spent = Spent()
    worker_seconds: float = 0.0
    workers: int = 0
    paused: bool = False
    pool: PoolState | None = None
    activity: str = ""


@dataclass
class Tally:
    """Counts of finished slots that rules look at; fed in the order in which slots finished.

    Attributes:
        failures: failed slots.
        since_best: finished slots since the best complete one; 0 before there is one.
    """

    failures: int = 0
    since_best: int = 0
    best_loss_nats: float = math.inf

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> Tally:
        """The tally of the finished slots among ``slots``."""
        tally = cls()
        finished = [slot for slot in slots if slot.state.finished]
        for slot in sorted(finished, key=lambda s: (s.finished_at is None, s.finished_at, s.number)):
            tally.add(slot)
        return tally

    def add(self, slot: Slot) -> None:
        self.failures += slot.state is SlotState.FAILED
        if slot.state is SlotState.COMPLETE and slot.loss_nats is not None and slot.loss_nats < self.best_loss_nats:
            self.best_loss_nats, self.since_best = slot.loss_nats, 0
        elif math.isfinite(self.best_loss_nats):
            self.since_best += 1


@dataclass(frozen=True)
class Limits:
    """When a search ends before its last slot; 0 is no limit. All count over every run of the study.

    Where a command searches several studies (``--targets``), its limits on time are those of all of them together.

    Attributes:
        max_seconds: time of searching.
        max_gpu_seconds: GPUs held times seconds.
        max_failures: failed slots.
        patience: finished trials without a better loss.
    """

    max_seconds: float = 0.0
    max_gpu_seconds: float = 0.0
    max_failures: int = 0
    patience: int = 0

    def met(self, spent: Spent, tally: Tally, elsewhere: Spent = NOTHING_SPENT) -> str:
        """The first rule that is met, in words; "" if none is.

        Args:
            spent: what the study has used up.
            tally: counts of its slots.
            elsewhere: what other studies have spent of the same limits.
        """
        both = spent + elsewhere
        if 0 < self.max_seconds <= both.seconds:
            shared = " for all targets" if elsewhere.seconds else ""
            return f"max_seconds: {both.seconds:.0f} s of searching{shared}, the limit is {self.max_seconds:g} s"
        if 0 < self.max_gpu_seconds <= both.gpu_seconds:
            shared = " for all targets" if elsewhere.gpu_seconds else ""
            return f"max_gpu_seconds: {both.gpu_seconds:.0f} GPU seconds{shared}, the limit is {self.max_gpu_seconds:g}"
        if 0 < self.max_failures <= tally.failures:
            return f"max_failures: {tally.failures} trial(s) failed, the limit is {self.max_failures}"
        if 0 < self.patience <= tally.since_best:
            return f"patience: no better loss in {tally.since_best} finished trials, the limit is {self.patience}"
        return ""


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Overrides:
    """What ``was-search set`` has said about a study; None leaves what its run says.

    Attributes:
        trials: slots of the study, at least 1.
        workers: size of the pool, at least 1, or a range such as ``2:64``.
        max_seconds: as in :class:`Limits`, like the three that follow; 0 lifts the limit.

    Raises:
        ConfigError: a number below its least.
    """

    trials: int | None = None
    workers: int | str | None = None
    max_seconds: float | None = None
    max_gpu_seconds: float | None = None
    max_failures: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            object.__setattr__(self, "workers", WorkerRange.parse(self.workers).plain)
        for name, value in self.given.items():
            if name == "workers":
                continue
            least = 1 if name == "trials" else 0
            if not (math.isfinite(value) and value >= least):
                rule = "must be at least 1" if least else "must be a number and not negative (0 lifts the limit)"
                raise ConfigError(f"{name}: {rule}, got {value!r}")
            most = MOST_TRIALS if name == "trials" else _LARGEST
            if value > most:
                raise ConfigError(f"{name}: must be at most {most}, got {value!r}")

    @property
    def given(self) -> dict[str, Any]:
        """The values that were set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def limits(self, of_the_run: Limits) -> Limits:
        """The limits ``of_the_run``, replaced where ``was-search set`` has said others."""
        names = {field.name for field in dataclasses.fields(Limits)}
        return dataclasses.replace(of_the_run, **{k: v for k, v in self.given.items() if k in names})

    def shared(self, elsewhere: Spent) -> Spent:
        """The part of ``elsewhere`` that counts: a limit that was set for this study is its own."""
        return Spent(
            elsewhere.seconds if self.max_seconds is None else 0.0,
            elsewhere.gpu_seconds if self.max_gpu_seconds is None else 0.0,
        )


OVERRIDABLE = tuple(field.name for field in dataclasses.fields(Overrides))
"""Settings of a run that ``was-search set`` can change, by their names in both."""


def limits_of(config: Mapping[str, Any]) -> Limits:
    """The limits in a run's settings as JSON; 0 for those that are not there."""
    return Limits(**{field.name: config.get(field.name, 0) for field in dataclasses.fields(Limits)})


TOGETHER = "limits together with"
"""Key in a run's settings as JSON: the studies of its command, which share its limits on time."""


@dataclass(frozen=True)
class Control:
    """All that is asked of a study.

    Attributes:
        wish: what its coordinator is to do.
        overrides: what ``was-search set`` has said.
        n_slots: slots that the study has now; they may be extended at any time.
    """

    wish: Wish = Wish.RUN
    overrides: Overrides = Overrides()
    n_slots: int = 0
