"""Step 1: score histograms of the dense model, and at an operating point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from was_search.compensation import Compensation
from was_search.masks.histogram import Histograms
from was_search.service.caching import CachedRow, cached
from was_search.service.context import Context
from was_search.service.token_sets import TokenSets
from was_search.shape import FloatArray, ModelShape
from was_search.texts.protocol import content_hash

if TYPE_CHECKING:
    from was_storage.studies.cache import Artifact


@dataclass(frozen=True)
class Calibration:
    """Histograms of the dense model on the calibration split, the model's shape and the cache key."""

    key: str
    shape: ModelShape
    histograms: Histograms


@dataclass(frozen=True)
class OperatingPoint:
    """Histograms re-taken under the masks of a vector.

    Attributes:
        key: the cache key, which also names the histograms to workers.
        histograms: taken under ``thresholds``.
        thresholds: float32 [L, 7]; on the calibration split they achieve the nominal sparsities.
        achieved: counted on the calibration split, [L, 7].
        passes: number of passes over the calibration split.
        compensation: what outputs were corrected by; None: by nothing.
    """

    key: str
    histograms: Histograms
    thresholds: npt.NDArray[np.float32]
    achieved: FloatArray
    passes: int
    compensation: Compensation | None = None


def calibrate(context: Context, tokens: TokenSets | None = None) -> Calibration:
    """Histograms of the dense model's scores; cached by model, score and calibration protocol.

    Args:
        context: settings: model, data and score.
        tokens: of the settings; None: they are made here.
    """
    settings = context.settings
    settings.require("model", "data")
    data = (tokens or TokenSets(context)).calibration
    key = content_hash("histograms", 1, context.model.key, settings.scoring, data.protocol)

    def make() -> Calibration:
        from was_search.coordinator.phases import histogram_runner

        pool = context.pool
        shape = pool.infos[0].shape
        with context.phase(f"calibrate on {data.protocol.brief()}", pool.n_parallel) as advance:
            histograms, _ = histogram_runner(pool, data, advance=advance)(None)
        # Non-finite scores are refused here, not in a trial.
        histograms.thresholds(np.full((shape.n_blocks, 7), 0.5))
        return Calibration(key, shape, histograms)

    return cached(
        CachedRow(context.cache, "histograms", key, lambda row: _read_calibration(row, key), _pack_calibration),
        make,
        context.reporter,
        "calibrate",
        data.protocol.brief(),
    )


def point_key(calibration: Calibration, sparsities: FloatArray, compensation: Compensation | None = None) -> str:
    """Key of :func:`operating_point`'s result in the cache; vectors count to nine decimals."""
    corrected = [] if compensation is None else [compensation.flat()]
    return content_hash("operating-point", 2, calibration.key, np.round(sparsities, 9), *corrected)


def operating_point(
    context: Context,
    calibration: Calibration,
    tokens: TokenSets,
    sparsities: FloatArray,
    name: str,
    compensation: Compensation | None = None,
) -> OperatingPoint:
    """Histograms at the vector called ``name``, re-taken until nominal sparsities are achieved.

    Outputs are corrected by ``compensation``, if there is one. Cached by vector and compensation.
    """
    rounded, key = np.round(sparsities, 9), point_key(calibration, sparsities, compensation)

    def make() -> OperatingPoint:
        from was_search.coordinator.phases import histogram_runner
        from was_search.masks import calibration as maths

        with context.phase(f"calibrate at {name}") as advance:
            runner = histogram_runner(context.pool, tokens.calibration, compensation, advance=advance)
            return OperatingPoint(
                key, *maths.operating_point(runner, calibration.histograms, rounded, calibration.shape), compensation
            )

    return cached(
        CachedRow(
            context.cache,
            "operating-point",
            key,
            lambda row: replace(_read_point(row, key, calibration.shape), compensation=compensation),
            _pack_point,
        ),
        make,
        context.reporter,
        f"calibrate at {name}",
        "operating point",
    )


def _read_calibration(found: Artifact, key: str) -> Calibration:
    shape = ModelShape.from_json(found.meta["shape"])
    return Calibration(key, shape, Histograms.from_bytes(found.payload, shape.n_blocks))


def _pack_calibration(found: Calibration) -> tuple[bytes, dict[str, Any]]:
    return found.histograms.to_bytes(), {"shape": found.shape.to_json()}


def _read_point(found: Artifact, key: str, shape: ModelShape) -> OperatingPoint:
    thresholds = np.asarray(found.meta["thresholds"], np.float32)
    achieved = np.asarray(found.meta["achieved"], np.float64)
    if not thresholds.shape == achieved.shape == shape.params.shape:
        raise ValueError(f"{shape.params.shape} is wanted, got {thresholds.shape} and {achieved.shape}")
    histograms = Histograms.from_bytes(found.payload, shape.n_blocks)
    return OperatingPoint(key, histograms, thresholds, achieved, int(found.meta["passes"]))


def _pack_point(point: OperatingPoint) -> tuple[bytes, dict[str, Any]]:
    meta = {
        "thresholds": [[float(v) for v in row] for row in point.thresholds],
        "achieved": point.achieved.tolist(),
        "passes": point.passes,
    }
    return point.histograms.to_bytes(), meta
