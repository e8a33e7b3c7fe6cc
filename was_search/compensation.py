"""Compensation: an affine correction of every projection's output, learned for one plan.

Where channels are dropped, a projection's output is ``scale * (W (m * x) + b) + constant`` with one scale and one
constant for each output, which cost no weights to read. Tokens that are dense keep ``W x + b``. Constants alone are
what SPON adds to a model with sparse activations (arXiv 2512.12744).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from was_search.errors import PlanError
from was_search.shape import PROJECTIONS, ModelShape

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
        outputs = sum(sum(row) for row in shape.out_features)
        return cls.from_flat(shape, np.repeat(np.asarray([1, 0], np.float32), outputs))

    @classmethod
    def from_flat(cls, shape: ModelShape, flat: Vector) -> Compensation:
        """The compensation whose :meth:`flat` is ``flat``, float32 [2 x outputs of all projections]."""
        widths = [width for row in shape.out_features for width in row]
        return cls._of(np.split(np.asarray(flat, np.float32), np.cumsum(widths + widths)[:-1]), shape.n_blocks)

    @classmethod
    def from_named(cls, n_blocks: int, tensors: dict[str, Any]) -> Compensation:
        """The compensation whose :meth:`named` pairs are among ``tensors``."""
        return cls._of((tensors[name] for name in cls.names(n_blocks)), n_blocks)

    @classmethod
    def _of(cls, vectors: Iterable[Vector], n_blocks: int) -> Compensation:
        """The compensation of ``vectors`` in the order of :meth:`flat`."""
        each = iter(vectors)
        scales, constants = (tuple(tuple(next(each) for _ in PROJECTIONS) for _ in range(n_blocks)) for _ in range(2))
        return cls(scales, constants)

    def flat(self) -> Vector:
        """All scales and then all constants, by block and projection: float32 [2 x outputs of all projections]."""
        return np.concatenate([vector for _, vector in self.named()])

    def named(self) -> Iterator[tuple[str, Vector]]:
        """Names as in a plan's tensors, such as ``scales.0.q``, and vectors."""
        vectors = (vector for rows in (self.scales, self.constants) for row in rows for vector in row)
        return zip(self.names(len(self.scales)), vectors, strict=True)

    @staticmethod
    def names(n_blocks: int) -> list[str]:
        """The names that :meth:`named` gives for ``n_blocks`` blocks."""
        return [
            f"{kind}.{b}.{name}" for kind in ("scales", "constants") for b in range(n_blocks) for name in PROJECTIONS
        ]

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
