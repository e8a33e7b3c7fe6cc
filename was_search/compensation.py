"""Compensation: an affine correction of every projection's output, learned for one plan.

Where channels are dropped, a projection's output is ``scale * (W (m * x) + b) + constant`` with one scale and one
constant for each output, which cost no weights to read. Tokens that are dense keep ``W x + b``. Constants alone are
what SPON adds to a model with sparse activations (arXiv 2512.12744).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.errors import PlanError
from was_search.shape import N_PROJECTIONS, PROJECTIONS, ModelShape

Vector = npt.NDArray[np.float32]
Rows = tuple[tuple[Vector, ...], ...]
"""L rows of seven float32 [out_features] arrays."""


@dataclass(frozen=True, eq=False)
class Compensation:
    """Scales and constants of the seven projections of L blocks; immutable.

    Attributes:
        scales: what outputs are multiplied by: L rows of seven float32 [out_features].
        constants: what is added afterwards, likewise.
    """

    scales: Rows
    constants: Rows

    @classmethod
    def none(cls, shape: ModelShape) -> Compensation:
        """The one that changes nothing: scales of 1, constants of 0."""
        return cls(_rows(shape, 1.0), _rows(shape, 0.0))

    @classmethod
    def from_flat(cls, shape: ModelShape, flat: Vector) -> Compensation:
        """The compensation whose :meth:`flat` is ``flat``, float32 [2 x outputs of all projections]."""
        widths = [width for row in shape.out_features for width in row]
        parts = iter(np.split(np.asarray(flat, np.float32), np.cumsum(widths + widths)[:-1]))
        scales, constants = (
            tuple(tuple(next(parts) for _ in range(N_PROJECTIONS)) for _ in range(shape.n_blocks)) for _ in range(2)
        )
        return cls(scales, constants)

    def flat(self) -> Vector:
        """All scales and then all constants, by block and projection: float32 [2 x outputs of all projections]."""
        return np.concatenate([vector for rows in (self.scales, self.constants) for row in rows for vector in row])

    def named(self) -> Iterator[tuple[str, Vector]]:
        """Names as in a plan's tensors, such as ``scales.0.q``, and vectors."""
        for kind, rows in (("scales", self.scales), ("constants", self.constants)):
            for b, row in enumerate(rows):
                for name, vector in zip(PROJECTIONS, row, strict=True):
                    yield f"{kind}.{b}.{name}", vector

    @staticmethod
    def names(n_blocks: int) -> list[str]:
        """The names that :meth:`named` gives for ``n_blocks`` blocks."""
        each = [f"{b}.{name}" for b in range(n_blocks) for name in PROJECTIONS]
        return [f"{kind}.{one}" for kind in ("scales", "constants") for one in each]

    @classmethod
    def from_named(cls, n_blocks: int, tensors: dict[str, Any]) -> Compensation:
        """The compensation whose :meth:`named` pairs are among ``tensors``."""
        scales, constants = (
            tuple(tuple(tensors[f"{kind}.{b}.{name}"] for name in PROJECTIONS) for b in range(n_blocks))
            for kind in ("scales", "constants")
        )
        return cls(scales, constants)

    def require(self, shape: ModelShape) -> None:
        """Refuse vectors that do not belong to a model of ``shape``, or that are not finite.

        Raises:
            PlanError: other numbers, widths or dtypes, or values that are infinite or not a number.
        """
        for kind, rows in (("scales", self.scales), ("constants", self.constants)):
            widths = tuple(tuple(vector.shape for vector in row) for row in rows)
            wanted = tuple(tuple((width,) for width in row) for row in shape.out_features)
            if widths != wanted or any(vector.dtype != np.float32 for row in rows for vector in row):
                raise PlanError(f"{kind}: one float32 array of out_features is needed for every projection")
            if not all(np.all(np.isfinite(vector)) for row in rows for vector in row):
                raise PlanError(f"{kind}: must be finite; the plan is damaged, export it again")


def _rows(shape: ModelShape, value: float) -> Rows:
    return tuple(tuple(_filled(width, value) for width in row) for row in shape.out_features)


def _filled(width: int, value: float) -> Vector:
    return np.full(width, value, np.float32)


def same(one: Compensation | None, other: Compensation | None) -> bool:
    """Whether two compensations hold the same values; None is like none only."""
    if one is None or other is None:
        return one is other
    pairs: Sequence[tuple[Rows, Rows]] = ((one.scales, other.scales), (one.constants, other.constants))
    return all(
        np.array_equal(a, b) for x, y in pairs for p, q in zip(x, y, strict=True) for a, b in zip(p, q, strict=True)
    )
