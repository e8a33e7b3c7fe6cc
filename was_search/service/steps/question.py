"""A study's question as a value: made once of the settings and passed on to the steps."""

from __future__ import annotations

from dataclasses import dataclass

from was_search.decode_time.profile import LatencyProfile
from was_search.service.context import Context
from was_search.service.steps.calibration import Calibration, calibrate
from was_search.service.steps.decode_time import budget_of, profile_of
from was_search.shape import ModelShape
from was_search.vectors.budget import Budget


@dataclass(frozen=True)
class Question:
    """What a study asks: which budget to spend, on which calibrated model.

    Attributes:
        calibration: the dense model's.
        budget: what every vector spends.
        latency: predicts decoding steps; None where no profile is known.
    """

    calibration: Calibration
    budget: Budget
    latency: LatencyProfile | None

    @classmethod
    def of(cls, context: Context) -> Question:
        """The question of the context's settings; calibrates the dense model where that is not cached.

        Raises:
            ConfigError: the profile is of another model, or the budget is out of its reach.
        """
        calibration = calibrate(context)
        shape = calibration.shape
        return cls(calibration, budget_of(context, shape), profile_of(context, shape))

    @property
    def shape(self) -> ModelShape:
        return self.calibration.shape
