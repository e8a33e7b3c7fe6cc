"""Decoding time in the steps: the profile to use, and its predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.decode_time.profile import LatencyProfile
from was_search.errors import ConfigError
from was_search.service.context import Context
from was_search.service.model import Model
from was_search.service.settings import Settings
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import content_hash

if TYPE_CHECKING:
    from was_search.service.steps.calibration import OperatingPoint
    from was_storage.studies.cache import Artifact, ArtifactCache, ArtifactInfo

CACHED_AS = "profile"


def profile_of(context: Context, settings: Settings) -> LatencyProfile | None:
    """The profile of ``--profile``, else the newest one in the database that is of the model's shape, else None.

    Args:
        context: its cache may hold profiles; its model is asked for the shape where it is needed at all.
        settings: name the profile.

    Raises:
        ConfigError: a file that is no profile, or one of another shape or other weights; or masks that no profile is
            made for.
    """
    if (why := _not_profiled(settings)) is not None:
        if settings.profile or settings.target_speedup:
            raise ConfigError(why)
        return None
    if settings.profile:
        found: LatencyProfile | None = LatencyProfile.load(Path(settings.profile))
    else:
        found = _newest_of_shape(context.cache, context.model, settings)
    if found is not None:
        found.require_weights(settings.weights)
        found.require_shape(context.model.shape)
    return found


def _not_profiled(settings: Settings) -> str | None:
    """Why no profile can predict steps with the settings' masks; None if one can."""
    if settings.masks == "shared":
        return "profile: steps with shared masks cannot be profiled yet; use --masks separate"
    return None


def _newest_of_shape(cache: ArtifactCache, model: Model, settings: Settings) -> LatencyProfile | None:
    rows = cache.list(CACHED_AS)
    if not rows:
        return None
    wanted = shape_key(model.shape)
    mine = [row for row in rows if row.meta.get("shape") == wanted and row.meta.get("weights") == settings.weights]
    if not mine:
        return None
    if settings.target_speedup:
        _require_one_device(mine)
    newest = max(mine, key=lambda row: row.created_at)
    return cache.get(CACHED_AS, newest.key, read_profile)


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


def predictions(
    profile: LatencyProfile | None, sparsities: FloatArray, point: OperatingPoint
) -> dict[str, dict[str, Any]]:
    """The entry ``step`` of a plan's provenance, its decoding step; {} where no profile is known."""
    if profile is None:
        return {}
    achieved = profile.figures(np.clip(point.achieved, 0.0, 1.0))
    return {"step": {"nominal": profile.figures(sparsities), "achieved": achieved, "profile": profile.summary()}}
