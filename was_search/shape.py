"""What the search knows of a model's size: the seven projections of every block, and which of them share a mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from was_search.errors import ModelError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linear maps of a block, in the order of every ``[L, 7]`` array."""

N_PROJECTIONS = len(PROJECTIONS)

ScoreKind = Literal["l1", "l2", "none"]
SCORE_KINDS: tuple[ScoreKind, ...] = ("l1", "l2", "none")
"""Kinds of norms in the weight-aware score."""

Masks = Literal["separate", "shared"]
MASKS: tuple[Masks, ...] = get_args(Masks)
"""Ways of masking. ``separate``: each projection has its own mask. ``shared``: q, k and v have one, gate and up too."""

Groups = tuple[tuple[int, ...], ...]
SEPARATE: Groups = tuple((p,) for p in range(N_PROJECTIONS))
SHARED: Groups = ((0, 1, 2), (3,), (4, 5), (6,))
"""Projections that share a mask, in the order of PROJECTIONS; those of a group have the same input."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ModelShape:
    """Input and output features of the seven projections of L blocks, read from the weights.

    Arrays are [L, 7] whatever the masks: projections that share one have the same sparsity, threshold and norms.

    Attributes:
        in_features: L rows of seven input widths, in channels.
        out_features: L rows of seven output widths, in channels.
        masks: which projections share a mask.
    """

    in_features: tuple[tuple[int, ...], ...]
    out_features: tuple[tuple[int, ...], ...]
    masks: Masks = "separate"

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            rows = getattr(self, name)
            if not rows or any(len(row) != N_PROJECTIONS or min(row) < 1 for row in rows):
                raise ModelError(f"{name}: every block needs {N_PROJECTIONS} positive widths, got {rows!r}")
        if len(self.in_features) != len(self.out_features):
            raise ModelError("in_features and out_features: different numbers of blocks")
        if self.masks not in MASKS:
            raise ModelError(f"masks: must be one of {', '.join(MASKS)}, got {self.masks!r}")
        for b, row in enumerate(self.in_features):
            for group in self.groups:
                if len({row[p] for p in group}) > 1:
                    names = ", ".join(PROJECTIONS[p] for p in group)
                    raise ModelError(f"block {b}: {names} have inputs of different widths and cannot share a mask")

    @property
    def n_blocks(self) -> int:
        return len(self.in_features)

    @property
    def params(self) -> IntArray:
        """Weights of each projection, [L, 7] int64; biases are not counted (they are never skipped)."""
        return np.asarray(self.in_features, np.int64) * np.asarray(self.out_features, np.int64)

    @property
    def block_params(self) -> IntArray:
        """Weights of each block's seven projections, [L] int64."""
        totals: IntArray = self.params.sum(axis=1)
        return totals

    @property
    def groups(self) -> Groups:
        """Projections that share a mask, every one in exactly one group."""
        return SHARED if self.masks == "shared" else SEPARATE

    def with_masks(self, masks: Masks) -> ModelShape:
        return replace(self, masks=masks)

    def tie(self, sparsities: npt.ArrayLike) -> FloatArray:
        """``sparsities`` [L, 7] with each group's members at their parameter-weighted mean; the model's mean stays."""
        tied = np.array(sparsities, np.float64)
        for group in self.groups:
            own = tied[:, list(group)]
            mean = np.average(own, axis=1, weights=self.params[:, list(group)])
            tied[:, list(group)] = np.where((own == own[:, :1]).all(axis=1), own[:, 0], mean)[:, None]
        return tied

    def copied(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``values`` [L, 7, ...] with the value of each group's first member copied to its other members."""
        result = np.array(values)
        for group in self.groups:
            result[:, list(group)] = result[:, [group[0]]]
        return result

    def divided(self, sums: FloatArray) -> FloatArray:
        """``sums``, held by each group's first member, divided among the group's members by parameters.

        Prices and slopes are sums: divided so, one parameter of any member has the same, and all members together
        have the group's. ``sums`` is [L, 7, ...] with zeros at the other members.
        """
        result = np.array(sums, np.float64)
        params = self.params.reshape(*self.params.shape, *(1,) * (result.ndim - 2)).astype(np.float64)
        for group in self.groups:
            if len(group) > 1:
                own = list(group)
                result[:, own] = result[:, own[:1]] * (params[:, own] / params[:, own].sum(1, keepdims=True))
        return result

    def sparsity(self, sparsities: npt.ArrayLike) -> float:
        """Parameter-weighted mean of ``sparsities`` [L, 7]: the one way a model's sparsity is counted."""
        return float((np.asarray(sparsities, np.float64) * self.params).sum() / self.params.sum())

    def levels(self, sparsities: npt.ArrayLike) -> FloatArray:
        """Parameter-weighted mean of each block's row of ``sparsities`` [L, 7]; returns [L] float64."""
        weighted: FloatArray = (np.asarray(sparsities, np.float64) * self.params).sum(axis=1)
        return weighted / self.block_params

    def to_json(self) -> dict[str, Any]:
        return {
            "in_features": [list(r) for r in self.in_features],
            "out_features": [list(r) for r in self.out_features],
            "masks": self.masks,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelShape:
        return cls(
            tuple(tuple(int(v) for v in row) for row in value["in_features"]),
            tuple(tuple(int(v) for v in row) for row in value["out_features"]),
            value["masks"],
        )
