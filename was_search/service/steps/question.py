"""A study's question as a value: made once of the settings and passed on to the steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from was_search.decode_time.profile import LatencyProfile
from was_search.service.context import Context
from was_search.service.model import Model
from was_search.service.reports.profile import SPREAD_WARNED
from was_search.service.reports.progress import Reporter
from was_search.service.settings import Settings
from was_search.service.steps.budgets import budget_of
from was_search.service.steps.calibration import Calibration
from was_search.service.steps.decode_time import profile_of
from was_search.service.steps.dense import Dense
from was_search.service.token_sets import TokenSets
from was_search.shape import ModelShape
from was_search.vectors.budget import Budget


@dataclass(frozen=True)
class Question:
    """What a study asks: which budget to spend, on which model; what follows from it is found when first needed.

    Attributes:
        settings: of one target.
        dense: what is known of the dense model, which several targets of a command share.
        together: studies of the command, which share its limits on time; empty where it has one study only.
    """

    settings: Settings
    dense: Dense
    together: frozenset[str] = frozenset()

    @classmethod
    def of(cls, context: Context) -> Question:
        """The question of the context's settings."""
        return cls(context.settings, Dense(context))

    def on(self, context: Context) -> Question:
        """The question as ``context`` can answer it: this one, unless it was asked of another context."""
        return self if self.dense.context is context else Question.of(context)

    def at(
        self, target: float, *, by_time: bool = False, study: str = "", warm_start: str = "", plan: str = ""
    ) -> Question:
        """The same for another target, in another study.

        ``target`` is a sparsity, or with ``by_time`` a speed-up.
        """
        settings = replace(
            self.settings,
            target=self.settings.target if by_time else target,
            target_speedup=target if by_time else 0.0,
            targets="",
            target_speedups="",
            max_ppl_increase="",
            study=study,
            warm_start=warm_start,
            plan=plan,
        )
        return Question(settings, self.dense)

    @property
    def model(self) -> Model:
        return self.dense.context.model

    @property
    def tokens(self) -> TokenSets:
        return self.dense.tokens

    @property
    def calibration(self) -> Calibration:
        """The dense model's; it is calibrated where that is not cached."""
        return self.dense.calibration

    @property
    def shape(self) -> ModelShape:
        return self.calibration.shape

    @cached_property
    def latency(self) -> LatencyProfile | None:
        """Predicts decoding steps; None where no profile is known.

        Raises:
            ConfigError: the profile is of another model or other weights.
        """
        return profile_of(self.dense.context, self.settings)

    def check_target(self, reporter: Reporter) -> None:
        """Refuse at once what ``budget`` and ``latency`` would refuse once the model is calibrated.

        Raises:
            ConfigError: as they do.
        """
        if self.settings.profile or self.settings.target_speedup:
            profile = self.latency
            budget_of(self.settings, self.model.shape, profile)
            if profile is not None and profile.spread > SPREAD_WARNED:
                reporter.note(
                    f"profile: one and the same step varied by {100 * profile.spread:.0f} % while it was measured; its "
                    "predictions are no better than that"
                )

    @cached_property
    def budget(self) -> Budget:
        """What every vector spends.

        Raises:
            ConfigError: no profile is known, or the budget is out of its reach.
        """
        return budget_of(self.settings, self.shape, self.latency)
