"""The time of one decoding step, predicted from the sparsities of a vector: a profile of one device.

A step is launches, and what lies between them. A launch reads the weights of one projection, or of several that share
an input (q, k, v; gate, up); its time falls with the sparsity of what it reads, each projection weighted by its
parameters, along a curve that was measured at a few sparsities (knots) and is a straight line between them. So

    seconds(s) = rest + sum over launches of curve(weighted mean of the launch's sparsities)

A curve holds what a launch takes above its time at the highest knot; ``rest`` is everything that no sparsity saves:
attention, head, norms, launches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.errors import ConfigError, InfeasibleError
from was_search.shape import N_PROJECTIONS, PROJECTIONS, FloatArray, IntArray, ModelShape
from was_search.texts.protocol import content_hash
from was_search.weight_format import AS_STORED, canonical, describe

VERSION = 1
_KIND = "was-search profile"
_MAX_BYTES = 16 << 20
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, eq=False)
class LaunchCurve:
    """The time that launches of one kind take, by sparsity.

    Attributes:
        projections: the members, as indices into PROJECTIONS; they share an input.
        blocks: those that have such a launch.
        knots: sparsities of the whole launch, float64 [K], rising from 0 to 1.
        seconds: time of one launch above its time at the last knot, float64 [K], never rising, 0 at the end.
    """

    projections: tuple[int, ...]
    blocks: tuple[int, ...]
    knots: FloatArray
    seconds: FloatArray

    def __post_init__(self) -> None:
        for name in ("knots", "seconds"):
            object.__setattr__(self, name, np.array(getattr(self, name), np.float64))
        if self.knots.ndim != 1 or self.knots.shape != self.seconds.shape or len(self.knots) < 2:
            raise ConfigError(
                f"profile: a curve needs as many seconds as knots, at least 2, got {self.seconds.shape} for "
                f"{self.knots.shape}"
            )
        if not (np.all(np.isfinite(self.knots)) and np.all(np.isfinite(self.seconds))):
            raise ConfigError("profile: knots and seconds must be finite numbers")
        if self.knots[0] != 0.0 or self.knots[-1] != 1.0 or not np.all(np.diff(self.knots) > 0.0):
            raise ConfigError(f"profile: knots must rise from 0 to 1, got {self.knots.tolist()}")
        if np.any(np.diff(self.seconds) > 0.0) or self.seconds[-1] != 0.0 or self.seconds[0] > _MOST_SECONDS:
            raise ConfigError(f"profile: seconds must fall to 0, got {self.seconds.tolist()}")


@dataclass(frozen=True, eq=False)
class LatencyProfile:
    """A model's decoding step on one device.

    Attributes:
        shape: the model's projections.
        curves: one for each kind of launch; together they hold every projection once.
        rest_seconds: what no sparsity saves.
        dense: seconds of the dense model's step by the way it was run, such as ``eager`` and ``compiled``.
        device: name of the device.
        dtype: dtype of the model.
        backend: backend of the sparse runtime, such as ``cuda, fused``.
        rows: sequences that decode together.
        kv_length: positions in the cache.
        versions: torch, triton, driver and so on, for people.
        measured_at: when, ISO 8601.
        source: ``measured``, or where else the figures come from.
        weights: how the projections' weights are held, as ``--weights`` says it.
        spread: standard deviation over mean of the times of one and the same step during the measurement.
        check: errors on vectors that took no part in the fit; {} where none were tried.
    """

    shape: ModelShape
    curves: tuple[LaunchCurve, ...]
    rest_seconds: float
    dense: Mapping[str, float]
    device: str
    dtype: str
    backend: str
    rows: int
    kv_length: int
    versions: Mapping[str, str] = field(default_factory=dict)
    measured_at: str = ""
    source: str = "measured"
    check: Mapping[str, Any] = field(default_factory=dict)
    spread: float = 0.0
    weights: str = AS_STORED

    def __post_init__(self) -> None:
        n_blocks = self.shape.n_blocks
        found = sorted((b, p) for curve in self.curves for b in curve.blocks for p in curve.projections)
        if found != [(b, p) for b in range(n_blocks) for p in range(N_PROJECTIONS)]:
            raise ConfigError(f"profile: its curves must hold every projection of {n_blocks} blocks once")
        for curve in self.curves:
            kinds = {
                tuple((self.shape.in_features[b][p], self.shape.out_features[b][p]) for p in curve.projections)
                for b in curve.blocks
            }
            if len(kinds) != 1 or len({width for width, _ in next(iter(kinds))}) != 1:
                names = ", ".join(PROJECTIONS[p] for p in curve.projections)
                raise ConfigError(f"profile: launches of {names} in one curve must have the same widths, got {kinds}")
        times = {"rest_seconds": self.rest_seconds, **{f"dense {name}": value for name, value in self.dense.items()}}
        for name, value in times.items():
            if not (math.isfinite(value) and 0.0 < value <= _MOST_SECONDS):
                raise ConfigError(f"profile: {name} must be positive seconds, got {value}")
        if not 0.0 <= self.spread < math.inf:
            raise ConfigError(f"profile: spread must be a share that is not negative, got {self.spread}")
        if not self.dense:
            raise ConfigError("profile: dense must hold the time of a dense step")
        if self.rows < 1 or self.kv_length < 1:
            raise ConfigError(f"profile: rows and kv_length must be positive, got {self.rows} and {self.kv_length}")
        if canonical(self.weights) != self.weights:
            raise ConfigError(f"profile: weights must be written {canonical(self.weights)!r}, got {self.weights!r}")
        for name in ("device", "dtype", "backend", "source"):
            if not getattr(self, name).isprintable():
                raise ConfigError(f"profile: {name} must be printable, got {getattr(self, name)[:80]!r}")

    @property
    def dense_seconds(self) -> float:
        """The fastest dense step that was measured: what speed-ups are over."""
        return min(self.dense.values())

    @property
    def dense_name(self) -> str:
        """The way in which :attr:`dense_seconds` was run."""
        return min(self.dense, key=lambda name: self.dense[name])

    @cached_property
    def hash(self) -> str:
        """Hash of all that decides a prediction, 64 hexadecimal digits."""
        value = self.to_json()
        names = ("shape", "launches", "rest_seconds", "dense", *_CONDITIONS, "weights")
        return content_hash(*(value[name] for name in names))

    @cached_property
    def members(self) -> tuple[tuple[IntArray, IntArray, FloatArray], ...]:
        """For each curve its blocks [n, 1], its projections [1, m], and their shares of the launch's parameters [m]."""
        params = self.shape.params
        found = []
        for curve in self.curves:
            weights = params[curve.blocks[0], list(curve.projections)].astype(np.float64)
            blocks, projections = np.asarray(curve.blocks, np.int64), np.asarray(curve.projections, np.int64)
            found.append((blocks[:, None], projections[None, :], weights / weights.sum()))
        return tuple(found)

    def predict(self, sparsities: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Seconds of a step at ``sparsities`` [..., L, 7]; float64 [...].

        Never rises with any sparsity. Nothing is extrapolated: a profile's knots go from 0 to 1.

        Raises:
            InfeasibleError: another shape, or values outside [0, 1].
        """
        vectors = self._checked(sparsities)
        total = np.full(vectors.shape[:-2], self.rest_seconds)
        for curve, (blocks, projections, weights) in zip(self.curves, self.members, strict=True):
            mean = vectors[..., blocks, projections] @ weights
            total = total + np.interp(mean, curve.knots, curve.seconds).sum(axis=-1)
        return total

    def seconds(self, sparsities: npt.ArrayLike) -> float:
        """:meth:`predict` of one vector [L, 7]."""
        return float(self.predict(sparsities))

    def speedup(self, seconds: float) -> float:
        """Speed-up of a step that takes ``seconds`` over the dense one."""
        return self.dense_seconds / seconds

    def savings(self, sparsities: npt.ArrayLike, width: float = 0.02) -> FloatArray:
        """Seconds that one unit more of each sparsity saves at ``sparsities`` [L, 7]; float64 [L, 7], never negative.

        The slope of each launch's curve over ``width`` to both sides, so that a knot is no edge.
        """
        vectors = self._checked(sparsities)
        found = np.zeros(self.shape.params.shape)
        for curve, (blocks, projections, weights) in zip(self.curves, self.members, strict=True):
            mean = vectors[blocks, projections] @ weights
            low, high = np.clip(mean - width, 0.0, 1.0), np.clip(mean + width, 0.0, 1.0)
            drop = np.interp(low, curve.knots, curve.seconds) - np.interp(high, curve.knots, curve.seconds)
            found[blocks, projections] = (drop / (high - low))[:, None] * weights
        return found

    def _checked(self, sparsities: npt.ArrayLike) -> FloatArray:
        vectors = np.asarray(sparsities, np.float64)
        if vectors.shape[-2:] != self.shape.params.shape:
            raise InfeasibleError(
                f"sparsities: the profile is of {self.shape.params.shape}, got shape {vectors.shape[-2:]}"
            )
        if not np.all((vectors >= 0.0) & (vectors <= 1.0)):
            raise InfeasibleError("sparsities: must be in [0, 1], where the profile was measured")
        return vectors

    def require_shape(self, shape: ModelShape) -> None:
        """Refuse a profile of another model's shape, with a ConfigError that names the first difference."""
        if shape.n_blocks != self.shape.n_blocks:
            raise ConfigError(
                f"profile: it is of a model with {self.shape.n_blocks} blocks, this one has {shape.n_blocks}; "
                "measure this one with 'was-search profile'"
            )
        for b, p in np.ndindex(shape.n_blocks, N_PROJECTIONS):
            theirs = (self.shape.out_features[b][p], self.shape.in_features[b][p])
            ours = (shape.out_features[b][p], shape.in_features[b][p])
            if ours != theirs:
                raise ConfigError(
                    f"profile: block {b}, {PROJECTIONS[p]}: it is of a {theirs} weight, the model has {ours}; "
                    "measure this one with 'was-search profile'"
                )

    def require_weights(self, weights: str) -> None:
        """Refuse a profile of weights that are held otherwise, with a ConfigError."""
        if weights != self.weights:
            raise ConfigError(
                f"profile: it is of {describe(self.weights)}, these are {describe(weights)}; measure with "
                f"'was-search profile --weights {weights}'"
            )

    def describe(self) -> str:
        """One line that says what was measured, and where."""
        made = "" if self.source == "measured" else f" ({self.source})"
        held = "" if self.weights == AS_STORED else f", {describe(self.weights)}"
        return (
            f"{self.device}{made}, {self.dtype}{held}, {self.backend}, {self.rows} row{'s' if self.rows > 1 else ''}, "
            f"{self.kv_length} positions, dense step {1e3 * self.dense_seconds:.3f} ms ({self.dense_name})"
        )

    def figures(self, sparsities: npt.ArrayLike) -> dict[str, float]:
        """Predicted milliseconds of a step at ``sparsities`` [L, 7] and the speed-up, as trials record them."""
        seconds = self.seconds(sparsities)
        return {"predicted_ms": round(1e3 * seconds, 6), "predicted_speedup": round(self.speedup(seconds), 6)}

    def words(self, sparsities: npt.ArrayLike) -> str:
        """:meth:`figures` for a sentence."""
        found = self.figures(sparsities)
        return (
            f"predicted decoding step {found['predicted_ms']:.3f} ms, {found['predicted_speedup']:.2f}x the dense one "
            f"({self.describe()})"
        )

    def summary(self) -> dict[str, Any]:
        """The profile's conditions without the curves, as JSON."""
        value = self.to_json()
        names = ("hash", "dense", "rest_seconds", *_CONDITIONS, "weights", "versions", "measured_at", "check", "spread")
        return {name: value[name] if name != "hash" else self.hash for name in names}

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": _KIND,
            "version": VERSION,
            **{name: getattr(self, name) for name in _CONDITIONS},
            "weights": self.weights,
            "versions": dict(self.versions),
            "measured_at": self.measured_at,
            "dense": dict(self.dense),
            "rest_seconds": self.rest_seconds,
            "shape": self.shape.to_json(),
            "launches": [
                {
                    "projections": [PROJECTIONS[p] for p in curve.projections],
                    "blocks": list(curve.blocks),
                    "knots": curve.knots.tolist(),
                    "seconds": curve.seconds.tolist(),
                }
                for curve in self.curves
            ],
            "check": dict(self.check),
            "spread": self.spread,
        }

    @classmethod
    def from_json(cls, value: Any) -> LatencyProfile:
        """Read a profile from JSON; raises ConfigError for anything that is no profile of this version."""
        if not isinstance(value, dict) or value.get("kind") != _KIND:
            raise ConfigError("profile: not a profile; 'was-search profile --output FILE' writes one")
        if value.get("version") != VERSION:
            raise ConfigError(
                f"profile: version must be {VERSION}, got {value.get('version')!r}; measure again with "
                "'was-search profile'"
            )
        try:
            curves = tuple(
                LaunchCurve(
                    tuple(PROJECTIONS.index(name) for name in launch["projections"]),
                    tuple(int(b) for b in launch["blocks"]),
                    np.asarray(launch["knots"], np.float64),
                    np.asarray(launch["seconds"], np.float64),
                )
                for launch in value["launches"]
            )
            return cls(
                shape=ModelShape.from_json(value["shape"]),
                curves=curves,
                rest_seconds=float(value["rest_seconds"]),
                dense={str(name): float(seconds) for name, seconds in value["dense"].items()},
                device=str(value["device"]),
                dtype=str(value["dtype"]),
                backend=str(value["backend"]),
                rows=int(value["rows"]),
                kv_length=int(value["kv_length"]),
                versions={str(name): str(text) for name, text in value["versions"].items()},
                measured_at=str(value["measured_at"]),
                source=str(value["source"]),
                check=dict(value["check"]),
                spread=float(value["spread"]),
                weights=str(value["weights"]),
            )
        except ConfigError:
            raise
        except Exception as error:  # a missing key, another type, widths that are none
            raise ConfigError(
                f"profile: damaged ({type(error).__name__}: {str(error)[:120]}); measure again"
            ) from error

    def save(self, path: Path) -> Path:
        """Write the profile as JSON.

        Raises:
            ConfigError: the file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output: cannot write {path} ({error.strerror}); choose another file") from error
        return path

    @classmethod
    def load(cls, path: Path) -> LatencyProfile:
        """Read a file of :meth:`save`.

        Raises:
            ConfigError: there is no such file, or it is no profile.
        """
        if not path.is_file():
            raise ConfigError(f"profile: {path} is not a file; 'was-search profile --output FILE' writes one")
        try:
            payload = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else None
            if payload is None:
                raise ConfigError(f"profile: {path} is larger than {_MAX_BYTES} bytes; not a profile")
            value = json.loads(payload)
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"profile: cannot read {path} ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"profile: {path} is not valid JSON ({str(error)[:80]})") from error
        return cls.from_json(value)


_CONDITIONS = ("device", "dtype", "backend", "rows", "kv_length", "source")
