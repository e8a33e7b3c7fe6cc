"""What a run's settings ask for: the budget, and its words in names and titles."""

from __future__ import annotations

from was_search.decode_time.profile import LatencyProfile
from was_search.decode_time.time_budget import TimeBudget
from was_search.errors import ConfigError
from was_search.service.settings import Settings
from was_search.shape import ModelShape
from was_search.vectors.budget import Budget, SparsityBudget


def budget_of(settings: Settings, shape: ModelShape, profile: LatencyProfile | None) -> Budget:
    """The settings' budget: of sparsity, or a :class:`TimeBudget` where a speed-up is asked for.

    Args:
        settings: what is asked for.
        shape: the model's.
        profile: :func:`was_search.service.steps.decode_time.profile_of` the settings.

    Raises:
        ConfigError: no profile is known, or the speed-up is out of its reach.
    """
    speedup = settings.target_speedup
    if not speedup:
        return SparsityBudget(shape, settings.target)
    if profile is None:
        raise ConfigError(
            "target_speedup: no profile of this model's shape is known; measure one on the target GPU with "
            "'was-search profile --output FILE' and give it with --profile FILE"
        )
    return TimeBudget(profile, speedup)


def target_label(settings: Settings) -> str:
    """The budget in a study's name: ``60`` or ``1.8x``."""
    if settings.target_speedup:
        return f"{settings.target_speedup:g}x"
    return f"{round(100 * settings.target, 2):g}"


def budget_title(settings: Settings) -> str:
    """The budget in a table's title: ``60 %`` or ``1.8x the dense step's speed``."""
    if settings.target_speedup:
        return f"{settings.target_speedup:g}x the dense step's speed"
    return f"{100 * settings.target:g} %"
