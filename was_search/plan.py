"""The plan: what a search exports and the runtime loads. A directory of ``plan.json`` and ``plan.safetensors``."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from was_search.compensation import Compensation
from was_search.errors import ConfigError, PlanError
from was_search.process import plain_json
from was_search.process.close_names import did_you_mean_path
from was_search.process.regular_files import IrregularFileError, read_regular
from was_search.process.writable import unwritable
from was_search.shape import PROJECTIONS, SCORE_KINDS, FloatArray, ModelShape, ScoreKind
from was_search.weight_format import AS_STORED, WeightFormat, describe

SCHEMA_VERSION = 1
"""Rises when an entry is added, removed or changes its meaning: an older plan is then refused, never misread.

A plan with a compensation has :data:`COMPENSATED_VERSION`, so that a program that knows of none refuses it; one without
is written as before there were any.

Entries of ``metrics`` and ``provenance`` may come and go: nothing needs them to decode.
"""

COMPENSATED_VERSION = 2
"""The version of plans with a compensation."""

Prefill = Literal["masked", "dense"]
PREFILLS: tuple[Prefill, ...] = ("masked", "dense")
JSON_NAME = "plan.json"
TENSORS_NAME = "plan.safetensors"
_MAX_JSON_BYTES = 64 << 20
_MAX_TENSORS_BYTES = 1 << 30
"""Largest file of tensors that is read; norms of a model with 126 blocks of width 16,384 take 76 MB."""

_ENTRIES = (
    *("model", "revision", "fingerprint", "shape", "weights", "score", "budget", "dense_prefix", "prefill"),
    *("achieved", "metrics", "provenance", "tensors"),
)
"""What is read of the JSON; the rest is for people."""

_VERSIONS = (SCHEMA_VERSION, COMPENSATED_VERSION)

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Plan:
    """Sparsities, thresholds and norms of one model, with where they come from.

    Attributes:
        model: hub id or folder name of the model.
        revision: hub revision, or "" for a folder.
        fingerprint: sha256 of the checkpoint's configuration and weights as stored.
        shape: widths of the seven projections of every block, and which of them share a mask.
        score: ``l1``, ``l2`` or ``none``.
        budget: the target: parameter-weighted mean of ``sparsities``.
        dense_prefix: tokens at a sequence's start that are never masked.
        sparsities: nominal, float64 [L, 7].
        thresholds: float32 [L, 7].
        norms: L rows of seven float32 [in_features] arrays; ones for ``none``.
        achieved: counted sparsity by split name.
        metrics: figures with their protocol, as JSON.
        provenance: study, trial, seed, versions, as JSON.
        prefill: what the runtime does with prompts: ``masked`` like one-token steps, or ``dense``.
        weights: ``none``, or the format that the projections' weights were rounded to, such as ``int4:128``.
        compensation: what masked tokens' outputs are corrected by; None: they are not.
    """

    model: str
    revision: str
    fingerprint: str
    shape: ModelShape
    score: ScoreKind
    budget: float
    dense_prefix: int
    sparsities: FloatArray
    thresholds: npt.NDArray[np.float32]
    norms: tuple[tuple[npt.NDArray[np.float32], ...], ...]
    achieved: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    prefill: Prefill = "masked"
    weights: str = AS_STORED
    compensation: Compensation | None = None

    def __post_init__(self) -> None:
        expected = (self.shape.n_blocks, len(PROJECTIONS))
        for name in ("sparsities", "thresholds"):
            value = getattr(self, name)
            if value.shape != expected:
                raise PlanError(f"{name}: shape must be {expected}, got {value.shape}")
            if value.dtype != (dtype := "float64" if name == "sparsities" else "float32"):
                raise PlanError(f"{name}: must be {dtype}, got {value.dtype}")
            if not np.all(np.isfinite(value)) or value.min() < 0.0:
                raise PlanError(f"{name}: must be finite and not negative, got {value.min()} to {value.max()}")
        if self.sparsities.max() >= 1.0:
            raise PlanError(f"sparsities: must be under 1, got {self.sparsities.max()}")
        if self.prefill not in PREFILLS:
            raise PlanError(f"prefill: must be one of {', '.join(PREFILLS)}, got {self.prefill!r}")
        try:
            WeightFormat.parse(self.weights)
        except ConfigError as error:
            raise PlanError(str(error)) from error
        if self.score not in SCORE_KINDS:
            raise PlanError(f"score: must be one of {', '.join(SCORE_KINDS)}, got {self.score!r}")
        if not (math.isfinite(self.budget) and 0.0 < self.budget < 1.0):
            raise PlanError(f"budget: must be in (0, 1), got {self.budget}")
        for name in ("model", "revision"):
            if not getattr(self, name).isprintable():
                raise PlanError(f"{name}: must be printable, got {getattr(self, name)!r}")
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise PlanError(f"fingerprint: must be 64 hexadecimal digits, got {self.fingerprint[:80]!r}")
        if not 0 <= self.dense_prefix < 2**31:
            raise PlanError(f"dense_prefix: must not be negative, and under 2^31, got {self.dense_prefix:.3g}")
        widths = tuple(tuple(n.shape for n in row) for row in self.norms)
        wanted = tuple(tuple((w,) for w in row) for row in self.shape.in_features)
        if widths != wanted or any(n.dtype != np.float32 for row in self.norms for n in row):
            raise PlanError("norms: one float32 array of in_features is needed for every projection")
        if not all(np.all(np.isfinite(n)) and n.min() >= 0.0 for row in self.norms for n in row):
            raise PlanError("norms: must be finite and not negative; the model's weights are damaged")
        self._require_one_mask_a_group()
        if self.compensation is not None:
            self.compensation.require(self.shape)

    def _require_one_mask_a_group(self) -> None:
        for b, (first, *others) in ((b, group) for b in range(self.shape.n_blocks) for group in self.shape.groups):
            for p in others:
                same = (
                    self.sparsities[b, p] == self.sparsities[b, first]
                    and self.thresholds[b, p] == self.thresholds[b, first]
                    and np.array_equal(self.norms[b][p], self.norms[b][first])
                )
                if not same:
                    raise PlanError(
                        f"block {b}: {PROJECTIONS[first]} and {PROJECTIONS[p]} share a mask, so their sparsities, "
                        "thresholds and norms must be the same"
                    )

    @property
    def schema_version(self) -> int:
        """The version that it is written as."""
        return SCHEMA_VERSION if self.compensation is None else COMPENSATED_VERSION

    def require_model(self, fingerprint: str, shape: ModelShape) -> None:
        """Refuse a model that the plan is not of.

        Raises:
            PlanError: the fingerprints differ (both are in the message) or the shapes do.
        """
        if fingerprint != self.fingerprint:
            raise PlanError(
                f"this plan belongs to another model: plan {self.model} {self.fingerprint}, "
                f"model at hand {fingerprint}; export a plan for this model"
            )
        self.require_shape(shape)

    def require_weights(self, weights: str) -> None:
        """Refuse a model whose projections' weights have another format, with a PlanError that names both."""
        if weights != self.weights:
            raise PlanError(
                f"this plan is for {describe(self.weights)} ({self.weights}), the model has {describe(weights)} "
                f"({weights}): thresholds and norms differ; load the model with weights "
                f"{self.weights}, or export a plan with --weights {weights}"
            )

    def require_shape(self, shape: ModelShape) -> None:
        """Refuse a module whose projections have other widths, with a PlanError that names the first difference."""
        if shape == self.shape:
            return
        if shape.n_blocks != self.shape.n_blocks:
            raise PlanError(f"plan for {self.shape.n_blocks} blocks, the model has {shape.n_blocks}")
        for b in range(shape.n_blocks):
            for p, name in enumerate(PROJECTIONS):
                ours = (self.shape.out_features[b][p], self.shape.in_features[b][p])
                theirs = (shape.out_features[b][p], shape.in_features[b][p])
                if ours != theirs:
                    raise PlanError(f"block {b}, {name}: plan for a {ours} weight, the model has {theirs}")
        raise PlanError(f"plan with {self.shape.masks} masks, the model's are {shape.masks}; export the plan again")

    def save(self, folder: Path) -> Path:
        """Write the two files into ``folder`` (made if missing); each file appears whole or not at all.

        Whatever lies there already, links among it, is replaced and never written through.

        Raises:
            PlanError: the folder cannot be written.
        """
        from safetensors.numpy import save

        tensors: dict[str, npt.NDArray[Any]] = {
            "sparsities": np.ascontiguousarray(self.sparsities, np.float64),
            "thresholds": np.ascontiguousarray(self.thresholds, np.float32),
        }
        for b, row in enumerate(self.norms):
            for name, norms in zip(PROJECTIONS, row, strict=True):
                tensors[f"norms.{b}.{name}"] = np.ascontiguousarray(norms, np.float32)
        if self.compensation is not None:
            tensors.update(self.compensation.named())
        payload = save(tensors)
        document = {
            "schema_version": self.schema_version,
            "model": self.model,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "shape": self.shape.to_json(),
            "projections": list(PROJECTIONS),
            "weights": self.weights,
            "score": self.score,
            "budget": self.budget,
            "dense_prefix": self.dense_prefix,
            "prefill": self.prefill,
            "levels": [round(float(v), 6) for v in self.shape.levels(self.sparsities)],
            "sparsities": [[round(float(v), 6) for v in row] for row in self.sparsities],
            "achieved": self.achieved,
            "metrics": self.metrics,
            "provenance": self.provenance,
            "tensors": {
                "file": TENSORS_NAME,
                "sha256": hashlib.sha256(payload).hexdigest(),
                "bytes": len(payload),
            },
        }
        document = json.loads(plain_json.dumps(document))  # as it will be read: keys are text, tuples are lists
        document["sha256"] = _document_hash(document)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / TENSORS_NAME, payload)
            _write(folder / JSON_NAME, (plain_json.dumps(document, indent=2) + "\n").encode())
        except OSError as error:
            raise PlanError(f"plan: cannot write {folder} ({error.strerror}); choose another folder") from error
        return folder

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a plan and check every length, shape and hash.

        Raises:
            PlanError: a file is missing, truncated, changed, of another schema version, or inconsistent.
        """
        from safetensors.numpy import load

        document = _read_document(folder)
        tensors_path = folder / TENSORS_NAME
        try:
            _require_all(folder / JSON_NAME, document, _ENTRIES)
            declared = document["tensors"]
            _require_all(folder / JSON_NAME, declared, ("sha256", "bytes"))
            _require_all(folder / JSON_NAME, document["shape"], ("in_features", "out_features", "masks"))
            payload = _read(tensors_path, _MAX_TENSORS_BYTES)
            if len(payload) != declared["bytes"]:
                why = "truncated" if len(payload) < declared["bytes"] else "put together from two"
                raise PlanError(
                    f"{tensors_path}: {declared['bytes']} bytes expected, got {len(payload)}; the plan is {why}, "
                    "copy it again"
                )
            if hashlib.sha256(payload).hexdigest() != declared["sha256"]:
                raise PlanError(
                    f"{tensors_path}: sha256 differs from {JSON_NAME}; the plan was changed, export it again"
                )
            tensors = load(payload)
            shape = ModelShape.from_json(document["shape"])
            each = (f"norms.{b}.{name}" for b in range(shape.n_blocks) for name in PROJECTIONS)
            _require_all(tensors_path, tensors, ("sparsities", "thresholds", *each))
            compensated = document["schema_version"] == COMPENSATED_VERSION
            require = _require_all if compensated else _require_none
            require(tensors_path, tensors, Compensation.names(shape.n_blocks))
            norms = tuple(tuple(tensors[f"norms.{b}.{name}"] for name in PROJECTIONS) for b in range(shape.n_blocks))
            return cls(
                model=str(document["model"]),
                revision=str(document["revision"]),
                fingerprint=str(document["fingerprint"]),
                shape=shape,
                score=str(document["score"]),  # type: ignore[arg-type]  # checked there
                budget=float(document["budget"]),
                dense_prefix=int(document["dense_prefix"]),
                sparsities=tensors["sparsities"],
                thresholds=tensors["thresholds"],
                norms=norms,
                achieved=dict(document["achieved"]),
                metrics=dict(document["metrics"]),
                provenance=dict(document["provenance"]),
                prefill=str(document["prefill"]),  # type: ignore[arg-type]  # checked there
                weights=str(document["weights"]),
                compensation=Compensation.from_named(shape.n_blocks, tensors) if compensated else None,
            )
        except PlanError as error:
            raise error if str(error).startswith(str(folder)) else PlanError(f"{folder}: {error}") from error
        except FileNotFoundError as error:
            raise PlanError(
                f"{tensors_path}: not found; a plan is a folder with {JSON_NAME} and {TENSORS_NAME}"
            ) from error
        except Exception as error:  # safetensors, JSON and numpy each raise their own
            raise PlanError(f"{folder}: not a readable plan ({error}); export it again") from error


def _document_hash(document: dict[str, Any]) -> str:
    body = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _require_all(path: Path, found: Collection[str], names: Iterable[str]) -> None:
    """Refuse a file that lacks one of ``names``: what wrote it knew another form of the same schema version."""
    lost = next((name for name in names if name not in found), None)
    if lost is not None:
        raise PlanError(
            f"{path}: has no {lost!r}, which plans of its schema_version have; another version of was-search wrote it, "
            "or it was changed; export it again"
        )


def _require_none(path: Path, found: Collection[str], names: Iterable[str]) -> None:
    """Refuse a file with one of ``names``: to leave it out would make another plan of it."""
    more = next((name for name in names if name in found), None)
    if more is not None:
        raise PlanError(
            f"{path}: has {more!r}, which plans of its schema_version have not; another version of was-search "
            "wrote it, or it was changed; export it again"
        )


def require_writable(folder: Path) -> None:
    """Refuse, before anything is computed, a folder in which no plan can be written.

    Raises:
        PlanError: ``folder``, or the last folder above it that exists, is no folder or cannot be written.
    """
    if why := unwritable(folder):
        raise PlanError(f"plan: cannot write {folder} ({why}); choose another folder with --plan")


def _plan_nearby(folder: Path) -> str:
    inside = folder / "plan"
    return f"; did you mean {str(inside)!r}?" if (inside / JSON_NAME).is_file() else did_you_mean_path(folder)


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / JSON_NAME
    if folder.is_file():
        around = f"; did you mean {str(folder.parent)!r}?" if (folder.parent / JSON_NAME).is_file() else ""
        raise PlanError(f"{folder}: is a file; a plan is a folder with {JSON_NAME} and {TENSORS_NAME}{around}")
    try:
        document = json.loads(_read(path, _MAX_JSON_BYTES))
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read ({error.strerror}); a plan is a folder with {JSON_NAME} and {TENSORS_NAME}"
            f"{_plan_nearby(folder)}"
        ) from error
    except PlanError:
        raise
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not valid JSON ({error}); the plan is truncated or changed") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(document, dict) or type(version) is not int or version not in _VERSIONS:
        known = " or ".join(map(str, _VERSIONS))
        raise PlanError(f"{path}: schema_version must be {known}, got {version!r}; export the plan again")
    if document.get("sha256") != _document_hash(document):
        raise PlanError(f"{path}: sha256 does not match its content; the plan was changed, export it again")
    return document


def _read(path: Path, most_bytes: int) -> bytes:
    """The bytes of a plan's file; what is none is refused, and no message shows its content."""
    try:
        return read_regular(path, most_bytes)
    except IrregularFileError as error:
        raise PlanError(f"{path}: {error.strerror}; a plan is a folder with {JSON_NAME} and {TENSORS_NAME}") from error


def _write(path: Path, payload: bytes) -> None:
    # A new file of a name that nobody can foresee: a link that lies there is not followed.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
