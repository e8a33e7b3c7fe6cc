"""Decoding time in the steps: the profile to use, the budget made of it, and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.decode_time.profile import LatencyProfile
from was_search.decode_time.time_budget import TimeBudget
from was_search.errors import ConfigError
from was_search.service.context import Context
from was_search.service.reports.profile import SPREAD_WARNED
from was_search.service.settings import Settings
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import content_hash
from was_search.vectors.budget import Budget, SparsityBudget

if TYPE_CHECKING:
    from was_search.service.steps.calibration import OperatingPoint
    from was_storage.studies.cache import Artifact, ArtifactInfo

CACHED_AS = "profile"


def profile_of(context: Context, shape: ModelShape | None = None) -> LatencyProfile | None:
    """The profile of ``--profile``, else the newest one in the database that is of the model's shape, else None.

    Args:
        context: its settings name the profile; its database may hold some.
        shape: the model's; None: read from its configuration, where it is needed at all.

    Raises:
        ConfigError: a file that is no profile, or one of another shape or other weights; or masks that no profile is
            made for.
    """
    if (why := _not_profiled(context.settings)) is not None:
        if context.settings.profile or context.settings.target_speedup:
            raise ConfigError(why)
        return None
    found = _profile_at_hand(context, shape)
    if found is not None:
        found.require_weights(context.settings.weights)
        if shape is not None:
            found.require_shape(shape)
    return found


def _not_profiled(settings: Settings) -> str | None:
    """Why no profile can predict steps with the settings' masks; None if one can."""
    if settings.masks == "shared":
        return "profile: steps with shared masks cannot be profiled yet; use --masks separate"
    return None


def _profile_at_hand(context: Context, shape: ModelShape | None) -> LatencyProfile | None:
    if path := context.settings.profile:
        return context.once(f"profile {path}", lambda: LatencyProfile.load(Path(path)))
    rows = context.once("profiles", lambda: context.cache.list(CACHED_AS))
    if not rows:
        return None
    wanted = shape_key(shape or model_shape(context))
    weights = context.settings.weights
    mine = [row for row in rows if row.meta.get("shape") == wanted and row.meta.get("weights") == weights]
    if not mine:
        return None
    if context.settings.target_speedup:
        _require_one_device(mine)
    newest = max(mine, key=lambda row: row.created_at)
    return context.once(f"profile {newest.key}", lambda: context.cache.get(CACHED_AS, newest.key, read_profile))


def _require_one_device(rows: list[ArtifactInfo]) -> None:
    """Refuse profiles of several devices: which one a speed-up is asked for cannot be guessed."""
    kinds = sorted({str(row.meta.get("conditions")) for row in rows})
    if len(kinds) > 1:
        raise ConfigError(
            f"profile: the database holds profiles of {len(kinds)} kinds ({'; '.join(kinds)}); say which one with "
            "--profile FILE, as 'was-search profile --output FILE' writes it"
        )


def read_profile(found: Artifact) -> LatencyProfile:
    """A profile from the cache."""
    import json

    return LatencyProfile.from_json(json.loads(found.payload))


def shape_key(shape: ModelShape) -> str:
    """Name of a shape in the cache."""
    return content_hash("shape", shape.to_json())[:16]


def model_shape(context: Context) -> ModelShape:
    """The model's projections from its configuration alone; no weight is read.

    Raises:
        ModelError: no model can be made of the configuration, or it lacks the projections.
    """
    return context.once("model shape", lambda: _model_shape(context))


def _model_shape(context: Context) -> ModelShape:
    from was_search.checkpoints.empty_model import empty_model
    from was_search.checkpoints.structure import find_structure

    return find_structure(empty_model(context.source), context.settings.masks).shape


def budget_of(context: Context, shape: ModelShape) -> Budget:
    """The settings' budget: of sparsity, or a :class:`TimeBudget` where a speed-up is asked for.

    Args:
        context: its settings and its profile decide.
        shape: the model's, which a profile must have.

    Raises:
        ConfigError: no profile is known, it is of another shape, or the speed-up is out of its reach.
    """
    speedup = context.settings.target_speedup
    if not speedup:
        return SparsityBudget(shape, context.settings.target)
    profile = profile_of(context, shape)
    if profile is None:
        raise ConfigError(
            "target_speedup: no profile of this model's shape is known; measure one on the target GPU with "
            "'was-search profile --output FILE' and give it with --profile FILE"
        )
    return TimeBudget(profile, speedup)


def check_target(context: Context) -> None:
    """Refuse at once what :func:`budget_of` and :func:`profile_of` would refuse once the shape is known.

    Raises:
        ConfigError: as these two.
    """
    if context.settings.profile or context.settings.target_speedup:
        shape = model_shape(context)
        profile = profile_of(context, shape)
        budget_of(context, shape)
        if profile is not None and profile.spread > SPREAD_WARNED:
            context.reporter.note(
                f"profile: one and the same step varied by {100 * profile.spread:.0f} % while it was measured; its "
                "predictions are no better than that"
            )


def target_identity(context: Context) -> dict[str, Any]:
    """The budget's part of a study's identity."""
    if not context.settings.target_speedup:
        return {"target": context.settings.target}
    return budget_of(context, model_shape(context)).identity


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


def predictions(
    profile: LatencyProfile | None, sparsities: FloatArray, point: OperatingPoint
) -> dict[str, dict[str, Any]]:
    """The entry ``step`` of a plan's metrics, its decoding step; {} where no profile is known."""
    if profile is None:
        return {}
    achieved = profile.figures(np.clip(point.achieved, 0.0, 1.0))
    return {"step": {"nominal": profile.figures(sparsities), "achieved": achieved, "profile": profile.summary()}}
